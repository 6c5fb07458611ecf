"""Do engines run where JAX is told to, and compute in what goes with it, by one rule for every command?"""

from types import SimpleNamespace

import pytest

import kdjax.engines
from kdjax.config import from_dict
from kdjax.engines import engine_device, engine_dtype, sleeping
from kdjax.training.teacher import engine_options


@pytest.mark.parametrize("driver", ["cpu", "cuda"])
@pytest.mark.parametrize(("told", "kept_off"), [(None, False), ("cpu", True), ("cuda", False), ("gpu,cpu", False)])
def test_engines_run_where_the_driver_answers_and_jax_may_go(monkeypatch, driver, told, kept_off):
    monkeypatch.setattr(kdjax.engines, "default_device", lambda: driver)
    monkeypatch.setattr(kdjax.engines.jax, "config", SimpleNamespace(jax_platforms=told))
    assert engine_device() == ("cpu" if kept_off else driver)


def test_auto_goes_with_the_device():
    assert [engine_dtype("auto", device) for device in ("cpu", "cuda")] == ["float32", "bfloat16"]
    assert engine_dtype("float32", "cuda") == "float32"


@pytest.mark.parametrize(("colocate", "device"), [(True, "cuda"), (True, "cpu"), (False, "cuda")])
def test_only_engines_that_share_a_gpu_sleep(colocate, device):
    values = {"teacher": {"path": "t"}, "student": {"path": "s"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    config = from_dict(values | {"colocate": colocate})
    asked = sleeping(config, device)
    assert bool(asked) == (colocate and device == "cuda")
    assert engine_options(config, asked).items() >= asked.items()
    plain = from_dict(values | {"teacher": {"path": "t", "engine": "transformers"}})
    assert engine_options(plain, asked) == {}
