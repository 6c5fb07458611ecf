"""Do engines run where JAX is told to, compute in what goes with it, and never sample padding, whoever started them?"""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from run_tools import Watcher

import kdjax.engines
from bridge.engine import Sampling
from kdjax.config import from_dict
from kdjax.engines import computes_bfloat16, engine_device, engine_dtype, engine_options, sleeping
from kdjax.errors import UserError
from kdjax.rollouts.engines import StudentEngines
from kdjax.rollouts.weights import student_label
from kdjax.training.loop import train

DATA = {"train": [{"path": "rows.jsonl"}]}


@pytest.mark.parametrize("driver", ["cpu", "cuda"])
@pytest.mark.parametrize("plugin", [None, "jax_cuda13_plugin"])
@pytest.mark.parametrize(("told", "kept_off"), [(None, False), ("cpu", True), ("cuda", False), ("gpu,cpu", False)])
def test_engines_run_where_the_driver_answers_and_jax_may_go(monkeypatch, driver, plugin, told, kept_off):
    monkeypatch.setattr(kdjax.engines, "find_spec", lambda name: name == plugin)
    monkeypatch.setattr(kdjax.engines, "default_device", lambda: driver)
    monkeypatch.setattr(kdjax.engines.jax, "config", SimpleNamespace(jax_platforms=told))
    assert engine_device() == ("cpu" if kept_off or plugin is None else driver)


@pytest.mark.parametrize(
    ("values", "told", "share"),
    [
        ({"teacher": {"path": "t"}}, {}, "0.50"),
        ({"teacher": {"path": "t", "mem_fraction": 0.2}, "rollout": {"mem_fraction": 0.3}}, {}, "0.70"),
        ({"teacher": {"path": "t", "mem_fraction": 0.2}, "distill": {"on_policy_fraction": 1.0}}, {}, "0.30"),
        ({"teacher": {"path": "t"}, "distill": {"on_policy_fraction": 1.0}, "colocate": True}, {}, "0.50"),
        (
            {
                "student": {"path": "t"},
                "teacher": {"path": "t", "update_every": 1},
                "distill": {"on_policy_fraction": 1.0},
                "rollout": {"engines": 0},
            },
            {},
            "0.50",
        ),
        ({"teacher": {"path": "t", "mem_fraction": 0.9}}, {}, "0.10"),
        ({"teacher": {"path": "t"}}, {"XLA_CLIENT_MEM_FRACTION": "0.8"}, None),
        ({"teacher": {"path": "t"}}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.8"}, "0.8"),
        ({}, {}, None),
    ],
)
def test_jax_leaves_its_engines_their_share(monkeypatch, values, told, share):
    for name in kdjax.engines.JAX_SHARE:
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    kdjax.engines.leave_room(from_dict({"student": {"path": "s"}, "data": {"train": [{"path": "x"}]}} | values))
    assert os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == share


def test_auto_goes_with_the_device():
    assert [engine_dtype("auto", device) for device in ("cpu", "cuda")] == ["float32", "bfloat16"]
    assert engine_dtype("float32", "cuda") == "float32"


@pytest.mark.parametrize(
    ("flags", "fast"),
    [("avx2 fma", False), ("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True), ("asimd bf16", True)],
)
def test_a_cpu_that_is_slow_at_bfloat16_is_known(tmp_path, flags, fast):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
    assert computes_bfloat16(tmp_path / "cpuinfo") == fast
    assert not computes_bfloat16(tmp_path / "none")


@pytest.mark.parametrize("fast", [False, True])
def test_a_run_whose_teacher_would_be_slow_in_bfloat16_says_so(monkeypatch, fast):
    values = {"student": {"path": "s"}, "teacher": {"path": "nowhere", "dtype": "bfloat16"}, "data": DATA}
    monkeypatch.setattr("kdjax.training.refusals.engine_device", lambda: "cpu")
    monkeypatch.setattr("kdjax.training.refusals.computes_bfloat16", lambda: fast)
    shown = Watcher()
    with pytest.raises(UserError):  # there is no such model
        train(from_dict(values), shown)
    assert any("teacher.dtype=bfloat16 on a CPU without" in line for line in shown.lines) != fast


@pytest.mark.parametrize(("colocate", "device"), [(True, "cuda"), (True, "cpu"), (False, "cuda")])
def test_only_engines_that_share_a_gpu_sleep(colocate, device):
    values = {"teacher": {"path": "t"}, "student": {"path": "s"}, "data": DATA}
    config = from_dict(values | {"colocate": colocate})
    asked = sleeping(config, device)
    assert bool(asked) == (colocate and device == "cuda")
    assert all(engine_options(group, asked).items() >= asked.items() for group in (config.teacher, config.rollout))
    plain = from_dict(values | {"teacher": {"path": "t", "engine": "transformers"}})
    assert engine_options(plain.teacher, asked) == {}


def test_a_teachers_copies_and_their_parts_reach_sglang():
    values = {"student": {"path": "s"}, "data": DATA, "teacher": {"path": "t", "tp": 2, "pp": 3, "dp": 4, "ep": 5}}
    expected = {"tp_size": 2, "pp_size": 3, "dp_size": 4, "ep_size": 5}
    assert engine_options(from_dict(values).teacher).items() >= expected.items()


@pytest.fixture
def student(monkeypatch, tmp_path):
    """what engines start from, without weights"""
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "vocab_size": 10}))
    monkeypatch.setattr("kdjax.rollouts.engines.export_student", lambda *_: tmp_path)


@pytest.mark.parametrize(("args", "first"), [({}, 0), ({"base_gpu_id": 4}, 4)])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_each_of_the_students_engines_has_gpus_of_its_own(student, monkeypatch, tmp_path, args, first, device):
    started = []
    monkeypatch.setattr("kdjax.rollouts.engines.engine_device", lambda: device)
    monkeypatch.setattr("kdjax.rollouts.engines.started", lambda model, key, **spec: started.append(spec["options"]))
    values = {"teacher": {"path": "t"}, "student": {"path": "s"}, "data": DATA}
    config = from_dict(values | {"rollout": {"engines": 3, "tp": 2, "args": args}})
    StudentEngines(config, SimpleNamespace(model=None), tmp_path, tell=print)
    assert [options["tp_size"] for options in started] == [2, 2, 2]
    stride = 2 if device == "cuda" else 0
    assert [options.get("base_gpu_id", 0) for options in started] == [first, first + stride, first + 2 * stride]


def test_the_students_sampling_is_as_configured_and_never_padding_in_the_teachers_engine_too(student, tmp_path):
    values = {"teacher": {"path": "t", "update_every": 1}, "student": {"path": "t"}, "data": DATA}
    cut = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_new_tokens": 6}
    rollout = cut | {"engines": 0, "stop_ids": [4]}
    config = from_dict(values | {"distill": {"on_policy_fraction": 1.0, "kd_ratio": 1.0}, "rollout": rollout})
    asked = []
    shared = SimpleNamespace(spec=SimpleNamespace(dtype="float32"), holds=student_label(-1), pid=1)
    shared.generate = lambda prompts, sampling: asked.append(sampling) or []
    step = SimpleNamespace(model=None)
    engines = StudentEngines(config, step, tmp_path, tell=print, banned_ids=[7, 9], shared=shared)
    engines.generate([np.array([1], np.int32)], [3])
    assert asked == [Sampling(**cut, stop_ids=(4,), banned_ids=(7, 9), seeds=(3,))]


def test_words_of_an_engine_that_was_started_again_before_its_weights_came_do_not_count(student, tmp_path):
    """as when the thread that sends weights finds it dead, between another's look at it and its question"""
    values = {"teacher": {"path": "t", "update_every": 1}, "student": {"path": "t"}, "data": DATA}
    values |= {"distill": {"on_policy_fraction": 1.0, "kd_ratio": 1.0}, "rollout": {"engines": 0}}
    said = [[SimpleNamespace(version=0)], [SimpleNamespace(version=5)]]
    shared = SimpleNamespace(spec=SimpleNamespace(dtype="float32"), holds=student_label(5), pid=1)

    def generate(prompts, sampling):
        shared.pid = 2  # that of the new process, already when it answers for the first time
        return said.pop(0)

    shared.generate = generate
    engines = StudentEngines(from_dict(values), SimpleNamespace(model=None), tmp_path, tell=print, shared=shared)
    engines.version = 5
    (completion,) = engines.generate([np.array([1], np.int32)], [3])
    assert completion.version == 5 and not said
