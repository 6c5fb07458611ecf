"""Streams of batches: what the teacher wrote is where the step reads it, and slots are reused without end."""

import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from run_tools import wait_until

from kdjax.config import from_dict
from kdjax.training.sources import Stream

pytestmark = pytest.mark.usefixtures("devices_as_asked")


def test_rows_arrive_aliased_and_slots_are_reused(run_values, tmp_path):
    """Forty batches of very different sizes through three slots; a row is the teacher's own for its token."""
    import torch
    from transformers import AutoModelForCausalLM

    from bridge.sglang_platform import mend_torchvision

    mend_torchvision()
    run_values["train"] |= {"batch_size": 2, "steps": 40}
    run_values["data"] |= {"packing": False, "max_len": 512}  # one document a row: loss rows vary most
    reference = AutoModelForCausalLM.from_pretrained(run_values["teacher"]["path"], dtype=torch.float32).model.eval()
    sizes = []
    with Stream(from_dict(run_values), log=tmp_path / "engine.log") as stream:
        low = stream.engine.pool._address
        for number in range(40):
            batch = next(stream)
            hidden = batch.arrays.teacher_hidden[0]
            sizes.append(batch.host.loss_tokens)
            pointer = hidden.addressable_shards[0].data.unsafe_buffer_pointer()
            assert low <= pointer < low + stream.engine.pool.spec.bytes
            if number % 13 == 0:
                placed = batch.host.documents[-1]
                with torch.no_grad():
                    ids = torch.tensor(placed.document.ids[None].astype(np.int64))
                    expected = reference(ids).last_hidden_state[0].numpy()[placed.document.loss_rows]
                got = np.array(hidden[placed.micro])[placed.offset :][: len(expected)]
                assert np.abs(got - expected).max() < 1e-4
            batch.release_after(jnp.zeros(()))
    assert max(sizes) > 1.5 * min(sizes)


def test_each_device_views_rows_of_its_own_part(run_values, tmp_path):
    """Four data shards: the piece on every device lies in that shard's part of the pool, so nothing was moved."""
    run_values["mesh"] = {"data": 2, "fsdp": 2}
    threads = {*threading.enumerate()}
    with Stream(from_dict(run_values), log=tmp_path / "engine.log") as stream:
        batch = next(stream)
        # One that works ahead, and none that would send weights to engines that there are not.
        assert [thread.name for thread in {*threading.enumerate()} - threads].count("kdjax-ahead") == 1
        hidden, pool = batch.arrays.teacher_hidden[0], stream.engine.pool
        part = pool.spec.part_rows * pool.spec.row_bytes
        pieces = hidden.addressable_shards
        assert len({piece.device for piece in pieces}) == 4
        for piece in pieces:
            shard = piece.index[1].start // piece.data.shape[1]
            offset = piece.data.unsafe_buffer_pointer() - pool._address
            assert shard * part <= offset and offset + piece.data.nbytes <= (shard + 1) * part
        batch.release_after(jnp.zeros(()))


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_the_teacher_is_ahead_of_the_student_by_what_is_asked(run_values, local_engines, tmp_path, lookahead):
    run_values["teacher"]["lookahead"] = lookahead
    with Stream(from_dict(run_values), log=tmp_path / "engine.log") as stream:
        (engine,) = local_engines
        batch = next(stream)  # and now, while a step would be computed:
        wait_until(lambda: engine.calls.count("prefill") == 1 + lookahead, 30)
        time.sleep(0.2)
        assert engine.calls.count("prefill") == 1 + lookahead
        batch.release_after(jnp.zeros(()))
