"""Optimizer state and parameters that wait in pinned host memory: where they are when, and the very same numbers."""

import shutil

import jax
import numpy as np
import pytest
from run_tools import go, losses

from kdjax.config import from_dict
from kdjax.errors import UserError
from kdjax.models import load_model
from kdjax.rollouts.engines import StudentEngines
from kdjax.training.step import Step

pytestmark = pytest.mark.usefixtures("devices_as_asked", "local_engines")


def kinds(tree):
    """where the arrays of a tree lie, lone numbers aside"""
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


@pytest.fixture
def values(on_policy_values, sharded_values):
    on_policy_values["train"] |= {"steps": 4, "batch_size": 2}
    on_policy_values["mesh"] = {"data": 1, "fsdp": 2}
    on_policy_values["checkpoint"] |= {"save_every": 1, "keep": 9}
    on_policy_values["colocate"] = True
    return on_policy_values


def test_a_run_is_the_same_to_the_bit_and_resumes(values, tmp_path, monkeypatch):
    whole = go(values, output=str(tmp_path / "whole"))
    device = jax.devices()[0].default_memory().kind
    write, train, seen = StudentEngines._generate, Step.__call__, []

    def writing(self, *arguments):
        seen.append(("generate", kinds(self._step.state["params"]), kinds(self._step.state["opt"])))
        return write(self, *arguments)

    def training(self, batch):
        seen.append(("train", kinds(self.state["params"]), kinds(self.state["opt"])))
        return train(self, batch)

    monkeypatch.setattr(StudentEngines, "_generate", writing)
    monkeypatch.setattr(Step, "__call__", training)
    values["train"]["offload"] = ["optimizer", "parameters"]
    run = tmp_path / "run"
    go(values)
    host = "pinned_host"
    assert host != device and seen == 4 * [("generate", {host}, {host}), ("train", {device}, {host})]
    assert losses(run) == losses(tmp_path / "whole")
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / str(step))
    shutil.rmtree(run / "export")
    again = go(values)
    assert losses(run) == losses(tmp_path / "whole")
    for x, y in zip(*(jax.tree.leaves(load_model(r.export)) for r in (whole, again)), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))


def test_parameters_are_put_away_for_engines_alone(values):
    values |= {"colocate": False}
    values["train"]["offload"] = ["parameters"]
    with pytest.raises(UserError, match="set colocate=true, or offload the optimizer alone"):
        from_dict(values)
