"""NaN and Inf stop a run by name: the step, the documents, the last good checkpoint; and nothing bad is saved."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_tools import go, losses, without_teacher
from step_tools import host, host_batch, make, parameters

from kdjax.config import from_dict
from kdjax.errors import UserError
from kdjax.losses import register_divergence
from kdjax.training.blame import blame
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.device_batch import DeviceBatch
from kdjax.training.sources import Stream, to_device

pytestmark = pytest.mark.usefixtures("devices_as_asked")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_teacher_row_changes_nothing_and_is_counted(value):
    step, batch = make(), host_batch(0)
    before = parameters(step)
    rows = np.flatnonzero(batch.mask[0])[:3]
    batch.teacher_hidden[0][0, rows, 5] = value
    metrics = step(to_device(batch, step.mesh))
    assert float(metrics["teacher_bad_rows"]) == 3
    after = parameters(step)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert int(step.state["step"]) == 0


def test_rows_without_loss_may_hold_anything():
    clean, dirty = make(), make()
    batch, other = host_batch(0), host_batch(0)
    other.teacher_hidden[0][~other.mask] = np.nan
    first, second = clean(to_device(batch, clean.mesh)), dirty(to_device(other, dirty.mesh))
    assert float(second["teacher_bad_rows"]) == 0 and float(first["loss"]) == float(second["loss"])
    a, b = parameters(clean), parameters(dirty)
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture
def values(run_values):
    run_values["data"]["eval"] = []
    run_values["train"] = {"steps": 6, "batch_size": 4, "learning_rate": 3e-3}
    run_values["checkpoint"] |= {"save_every": 2}
    run_values["teacher"] |= {"preflight": False}
    return run_values


def test_teacher_rows_stop_the_run_with_document_and_checkpoint(values):
    consult, poisoned = Stream._consult, []

    def poison(self, host):
        ((lease, seconds),) = consult(self, host)
        if self.data.statistics.batches == 4:
            placed = host.documents[2]
            row = lease.starts[placed.shard] + placed.micro * host.batch.rows.shape[-1] + placed.offset
            pool = self.engine.pool
            np.frombuffer(pool._memory, np.float32, pool.spec.width, row * pool.spec.row_bytes)[0] = np.nan
            poisoned.append(placed.document.source)
        return [(lease, seconds)]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(Stream, "_consult", poison)
        go(values)
    message = str(caught.value)
    assert message.startswith("step 4: the teacher's hidden rows are not finite")
    assert f"it comes from {poisoned[0]}; the last good checkpoint is that of step 2" in message
    assert "\n" not in message and "gsm8k_train.jsonl:" in poisoned[0]
    assert go(values).steps == 6
    assert losses(values["output"], "teacher_bad_rows") == []


@pytest.mark.parametrize(
    ("save_every", "left"),
    [
        (1, "the last good checkpoint is that of step 1"),
        (None, r"there is no checkpoint yet \(checkpoint.save_every\)"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(values, save_every, left):
    """here because the first update throws every weight out to 1e30"""
    values["checkpoint"]["save_every"] = save_every
    values["train"]["learning_rate"] = 1e30
    with pytest.raises(UserError) as caught:
        go(without_teacher(values))
    what = r"^step 2: loss or gradient is not finite \(loss \S+, gradient norm nan\)"
    assert re.search(rf"{what}; it comes from \S+gsm8k_train.jsonl:\d+.*; {left}; lower train", str(caught.value))
    kept = ["1"] if save_every else []
    assert [path.name for path in (Path(values["output"]) / "checkpoints").iterdir()] == kept


@register_divergence("test_nan_where_loud")
def nan_where_loud(student, teacher, *, temperature=1.0):
    return jnp.where(jnp.abs(teacher).max(-1) > 30, jnp.nan, jnp.square(student - teacher).mean(-1))


@register_divergence("test_steep_where_loud")
def steep_where_loud(student, teacher, *, temperature=1.0):
    """finite, with a gradient that is not: a root of zero"""
    near = 1 + jnp.square(student).mean(-1)
    return jnp.sqrt(jnp.where(jnp.abs(teacher).max(-1) > 30, 0.0 * student.mean(-1), near))


@pytest.mark.parametrize(("loss", "accumulate"), [("test_nan_where_loud", 2), ("test_steep_where_loud", 1)])
def test_a_loss_or_gradient_that_is_not_finite_names_its_documents(loss, accumulate):
    step = make(distill={"loss": loss, "kd_ratio": 0.5})
    made = host(0, accumulate, loud=(3, 8))
    before = parameters(step)
    batch = DeviceBatch(to_device(made.batch, step.mesh), made)
    metrics = step(batch)
    assert np.isfinite(float(metrics["loss"])) == (loss != "test_nan_where_loud")
    assert not np.isfinite(float(metrics["loss"] + metrics["grad_norm"]))
    what, places = blame(step, batch)
    assert (what, sorted(places)) == ("loss or gradient is", ["made:3", "made:8"])
    after = parameters(step)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_many_documents_are_not_all_named():
    step = make(distill={"loss": "test_nan_where_loud"})
    made = host(0, loud=range(14))
    what, places = blame(step, DeviceBatch(to_device(made.batch, step.mesh), made))
    assert len(places) == 4


def test_a_state_that_holds_nan_is_never_saved_over_a_good_one(values, tmp_path):
    step = make()
    with Checkpoints(tmp_path / "checkpoints", from_dict(without_teacher(values)).checkpoint) as checkpoints:
        checkpoints.save(1, step.state, {})
        checkpoints.wait()
        leaves, tree = jax.tree.flatten(step.state)
        i = next(i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating))
        leaves[i] = leaves[i].at[(0,) * leaves[i].ndim].set(jnp.nan)
        with pytest.raises(UserError, match="step 2: the state holds NaN or Inf and is not saved; .* of step 1"):
            checkpoints.save(2, jax.tree.unflatten(tree, leaves), {})
        checkpoints.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
