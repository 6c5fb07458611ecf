"""Does `make gpu` fail where what it measures is wrong? Nothing of it is run here: only what judges."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import quickstart, record
from benchmarks.gpu import __main__ as gpu, loss, pool, runs, sharing, step, sync
from benchmarks.gpu.shapes import shape
from kdjax.config import load_config
from kdjax.data import load_tokenizer, valid_ids
from kdjax.models.attention import causal_attention


class Engine:
    """Says ``words`` one after the other; the last of them from then on."""

    def __init__(self, *words):
        self.words = [np.full(199, word, np.float32) for word in words]

    def score(self, prompts):
        return [self.words.pop(0) if len(self.words) > 1 else self.words[0] for _ in prompts]

    def sleep(self):
        pass

    wake = sleep

    def update_weights(self, tensors, **_):
        pass


def test_rows_that_come_wrong_through_the_pool(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "under_fire", lambda *_, **__: {"wrong": 1, "changed": 1})
    with pytest.raises(RuntimeError, match="came through the pool are wrong: .*'changed': 1"):
        pool.measure(None, True, tmp_path)


@pytest.mark.parametrize(("woke", "fails"), [(-2.0, False), (-2.01, True), (np.nan, True)])
def test_an_engine_that_wakes_up_another(monkeypatch, tmp_path, woke, fails):
    monkeypatch.setattr(sharing, "teacher_folder", lambda *_: tmp_path)
    monkeypatch.setattr(sharing, "start_engine", lambda *_, **__: nullcontext(Engine(-2.0, woke)))
    with pytest.raises(RuntimeError, match="woke up another") if fails else nullcontext():
        assert sharing.engine(True, tmp_path)["gap"] == 0


@pytest.mark.parametrize(("after", "fails"), [(-np.log(4096), False), (-8.0, True), (np.nan, True)])
def test_an_engine_that_kept_its_weights(monkeypatch, after, fails):
    class Tensors(list):
        gpu = None

    class Student:
        """Every id is as likely as any other."""

        def __call__(self, tokens):
            return jnp.zeros((*tokens.shape, 4))

        def logits(self, hidden):
            return jnp.zeros((len(hidden), 4096))

    monkeypatch.setattr(sync, "EngineTensors", lambda *_, **__: Tensors())
    monkeypatch.setattr(sync, "hf_tensors", lambda *_: [("weight", np.ones(4, np.float32))])
    with pytest.raises(RuntimeError, match="does not run the weights that were sent") if fails else nullcontext():
        found = sync.sent(Student(), Engine(-8.0, after), "float32", "cpu")
        assert found["gap_after"] < 1e-5 < 0.3 < found["gap_before"]


@pytest.mark.parametrize(("found", "code"), [({"failed": "why"}, 1), ({"left_out": "no time"}, 0), ({"seconds": 1}, 0)])
def test_a_case_that_fails_fails_the_command(monkeypatch, tmp_path, found, code):
    out = tmp_path / "toy.json"
    monkeypatch.setattr(gpu, "run", lambda *_: dict(found))
    monkeypatch.setattr("sys.argv", ["gpu", "--toy", "--sections", "pool", "--out", str(out)])
    assert gpu.main() == code
    assert json.loads(out.read_text())["pool"] == found


@pytest.mark.parametrize("divergence", ["kl", "jsd"])
@pytest.mark.parametrize(
    ("values", "gradients", "said"),
    [
        (1.001, 1.01, None),
        (1.003, 1.0, "value"),
        (np.nan, 1.0, "value"),
        (1.0, 1.03, "hidden"),
    ],
)
def test_a_fused_loss_that_is_another(monkeypatch, values, gradients, said, divergence):
    rng = np.random.default_rng(0)
    arrays = tuple(
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((300, 8), (8, 50), (300, 8), (8, 50))
    )

    def another(name):
        def run(*few):
            value = loss.naive(name)(*(jnp.float32(x) for x in few))
            return gradients * value + jax.lax.stop_gradient((values - gradients) * value)

        return run

    monkeypatch.setattr(loss, "fused", another)
    with (
        nullcontext() if said is None else pytest.raises(ArithmeticError, match=f"fused {divergence} .* apart: {said}")
    ):
        gaps = loss.checked(arrays, divergence)
        assert gaps["value"] == pytest.approx(values - 1, rel=0.02)
        assert gaps["head"] == pytest.approx(gradients - 1, rel=0.1)


def test_what_needs_a_package_that_is_not_installed_is_left_out(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(gpu, "run", lambda section, case, *_: asked.append(case) or {})
    monkeypatch.setattr(gpu, "_gpu_name", lambda: "a GPU")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--sections", "loss", "sharing", "--out", str(out)])
    assert gpu.main() == 0 and asked == ["kl", "jsd", "parameters", "allocators"]
    found = json.loads(out.read_text())
    assert found["loss"]["liger"] == {"left_out": "liger-kernel is not installed"}
    assert "torch_memory_saver" in found["sharing"]["engine"]["left_out"]
    assert {need for need in gpu.NEEDS} <= {(section, case) for section, case, _ in gpu.JOBS}


def test_a_case_that_is_stopped_leaves_what_it_had_written(monkeypatch, tmp_path):
    old, late = tmp_path / "old.log", "import sys, time; sys.stdout.write('begun'); sys.stdout.flush(); time.sleep(60)"
    old.write_text("an earlier case")
    os.utime(old, (1, 1))
    start = gpu.subprocess.Popen

    def case(command, **more):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "engine.log").write_text("loading weights")
        return start([sys.executable, "-c", late], **more)

    monkeypatch.setattr(gpu.subprocess, "Popen", case)
    failed = gpu.run("runs", "on-policy", 3, False, tmp_path)["failed"]
    assert failed.startswith("stopped after 3 s\nbegun") and "engine.log: loading weights" in failed
    assert "an earlier case" not in failed


def test_every_case_has_a_time_limit():
    limits = {(section, case): seconds for section, case, seconds in gpu.JOBS}
    assert {case for section, case in limits if section == "runs"} == {"teacher", *runs.CASES}
    assert {case for section, case in limits if section == "loss"} == set(loss.CHUNKS)
    assert len(limits) == len(gpu.JOBS)


@pytest.mark.parametrize("case", runs.CASES)
def test_what_a_run_on_a_gpu_is_told_is_understood(monkeypatch, tmp_path, case):
    """at full size too, so that no misspelt key costs the run"""
    told = []

    def run(out, values, skip):
        told.append(load_config(quickstart.CONFIG, [f"{key}={json.dumps(value)}" for key, value in values.items()]))
        (out / "checkpoints").mkdir(parents=True)
        (out / "student").mkdir()
        (out / "student" / "config.json").write_text('{"hidden_size": 8, "vocab_size": 9}')
        return {"sync": {"seconds": 1.0}}

    monkeypatch.setattr(runs, "teacher_folder", lambda *_: tmp_path)
    monkeypatch.setattr(runs, "run", run)
    found = runs.measure(case, False, tmp_path)
    assert told[0].student.dtype == "bfloat16" and found["shapes"]["teacher"] == "4B"
    assert told[0].teacher.lookahead == (0 if "turns" in case else 1) and told[0].colocate == (case == "colocated")


def test_what_a_case_on_a_gpu_finds_in_its_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_installed", lambda package: False)
    for name in gpu.JAX_SHARE:  # a run in this very process may have set it
        monkeypatch.delenv(name, raising=False)
    found = {(section, case): gpu._environment(section, case, tmp_path) for section, case, _ in gpu.JOBS}
    alone = {job for job, values in found.items() if "XLA_PYTHON_CLIENT_MEM_FRACTION" in values}
    grows = {job for job, values in found.items() if values.get("XLA_PYTHON_CLIENT_PREALLOCATE") == "false"}
    assert alone == {job for job in found if job[0] in ("loss", "step")} - {("loss", "liger")}
    assert found.keys() - alone - grows == {job for job in found if job[0] == "runs"} and not alone & grows
    assert {values["SGLANG_IS_FLASHINFER_AVAILABLE"] for values in found.values()} == {"false"}
    monkeypatch.setattr(gpu, "_installed", lambda package: True)
    assert "SGLANG_IS_FLASHINFER_AVAILABLE" not in gpu._environment("runs", "on-policy", tmp_path)
    monkeypatch.setenv(gpu.JAX_SHARE[1], "0.5")
    assert gpu.JAX_SHARE[0] not in gpu._environment("loss", "kl", tmp_path)


def test_a_step_that_the_gpu_cannot_hold_is_left_out(monkeypatch):
    jobs = [(section, case) for section, case, _ in gpu.JOBS if section == "step"]
    for memory, left_out in (
        ("81559 MiB", {"4B, 4 rows", "4B, 2 rows", "4B, 1 rows", "1.7B, 8 rows"}),
        ("143771 MiB", set()),
    ):
        monkeypatch.setattr(gpu, "gpus", lambda memory=memory: [f"NVIDIA, 580.1, {memory}, 1980 MHz, 2619 MHz"])
        lacking = {case.partition(", remat")[0] for section, case in jobs if gpu._lacking(section, case)}
        assert lacking == left_out


@pytest.mark.parametrize(
    ("case", "scanned"), [("0.6B, 2 rows, remat dots", True), ("0.6B, 2 rows, remat dots, unrolled", False)]
)
def test_layers_of_a_step_that_is_unrolled_are_compiled_apart(monkeypatch, tmp_path, case, scanned):
    made = []
    monkeypatch.setattr(step, "make_student", lambda settings, mesh: made.append(settings.student) or pytest.fail())
    with pytest.raises(pytest.fail.Exception):
        step.measure(case, True, tmp_path)
    assert [(student.scan_layers, student.remat) for student in made] == [(scanned, "dots")]


def test_a_case_without_time_is_left_out_and_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("it was begun"))
    monkeypatch.setattr("sys.argv", ["gpu", "--toy", "--seconds", "20", "--out", str(tmp_path / "toy.json")])
    assert gpu.main() == 0
    assert json.loads((tmp_path / "toy.json").read_text())["pool"] == {"left_out": "no time"}


def test_the_benchmarks_teacher_has_an_id_for_every_row_of_its_head(root, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(root / "examples" / "tokenizer", folder)
    before = load_tokenizer(folder).encode("Four loaves at $3 each.<|im_end|>")
    runs.fill_vocabulary(folder / "tokenizer.json", 5000)
    filled = load_tokenizer(folder)
    assert valid_ids(filled, 5000).all() and filled.encode("Four loaves at $3 each.<|im_end|>") == before


def test_results_of_other_benchmarks_do_not_make_a_commit_another(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.delenv("KDJAX_COMMIT", raising=False)
    assert record.commit() == "unknown"  # no checkout
    results, code = tmp_path / "benchmarks" / "results", tmp_path / "code.py"
    results.mkdir(parents=True)
    for file in (code, results / "one.json", tmp_path / "README.md"):
        file.write_text("1")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "one")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    for file in (results / "one.json", tmp_path / "README.md"):
        file.write_text("2")
    clean = record.commit()
    code.write_text("2")
    assert len(clean) == 12 and record.commit() == f"{clean}-dirty"


def test_a_machine_without_git_names_the_commit_itself(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("KDJAX_COMMIT", "abc")
    assert record.commit() == "abc"


@pytest.mark.parametrize("causal", [True, False])
def test_attention_that_is_another(monkeypatch, causal):
    """a kernel that is asked for in cuDNN's place, over a small model"""

    def kernel(q, k, v, segment_ids, implementation):
        if implementation == "xla":
            return causal_attention(q, k, v)
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

    monkeypatch.setattr("kdjax.models.decoder.causal_attention", kernel)
    monkeypatch.setattr(step, "shape", lambda size, toy: shape(size, True))
    with nullcontext() if causal else pytest.raises(ArithmeticError, match="attention by cuDNN is not XLA's"):
        found = step.kernels(False)
        assert 0 < found["relative_gap_of_rows"] < 0.02
        error, usual = found["rows_from_float32"]
        assert 0 < error != usual < 0.02 and found["relative_gap"] < 1e-3
