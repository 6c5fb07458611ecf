"""What XLA makes of the step: the same numbers on any mesh, memory written over, and no wait for the host."""

import re

import jax
import numpy as np
import pytest
from step_tools import close, host_batch, make, parameters, run

from kdjax.training.sources import to_device

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)], ids=["data", "fsdp", "tensor", "mixed"])
def test_eight_devices_equal_one(sizes):
    devices = int(np.prod(sizes))
    alone, spread = make(), make(sizes, devices)
    for a, b in zip(run(alone, 3), run(spread, 3), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    close(parameters(alone), parameters(spread), 1e-5)
    # Matrices are split over fsdp × tensor; norms (a few numbers) and what does not divide are on every device.
    whole = sum(x.nbytes for x in jax.tree.leaves(alone.state))
    share = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(spread.state))
    assert share <= whole / (sizes[1] * sizes[2]) * 1.25


def test_the_state_is_written_over_and_nothing_waits_for_the_host():
    """Every array of the state has its input's memory, and a step neither fetches nor sends a number on its way."""
    step = make()
    batch = to_device(host_batch(0), step.mesh)
    with jax.set_mesh(step.mesh):
        text = step._update.lower(step.state, step._frozen, batch).compile().as_text()
    aliased = text.partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
    leaves = len(jax.tree.leaves(step.state))
    assert sorted(map(int, re.findall(r"\{\d+\}: \((\d+), \{\}", aliased))) == list(range(leaves))
    assert not re.search(r"callback|outfeed|infeed|\b(send|recv)\(", text)
    step(batch)
    before = jax.tree.leaves(step.state)
    with jax.transfer_guard("disallow"):
        metrics = step(batch)
    assert all(x.is_deleted() for x in before) and np.isfinite(float(metrics["loss"]))
