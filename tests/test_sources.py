"""Streams of batches: what the teacher wrote is where the step reads it, and slots are reused without end."""

import threading
import time
from collections import deque
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from run_tools import wait_until

from bridge.hidden_pool import HiddenPool
from kdjax.algorithms import make_algorithm
from kdjax.config import from_dict
from kdjax.errors import UserError
from kdjax.training.optimizer import make_optimizer
from kdjax.training.sources import Stream
from kdjax.training.step import make_step
from kdjax.training.student import make_student
from kdjax.training.teacher import TeacherEngine

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


@pytest.mark.parametrize(("lookahead", "together", "seen"), [(0, 1, [1]), (0, 2, [1]), (1, 1, [])])
def test_without_lookahead_the_teacher_waits_for_the_step(
    run_values, local_engines, tmp_path, lookahead, together, seen
):
    """A step runs on while the loop asks for the next batch, and turns are turns; but the teacher's next turn comes
    only when the batches of its last are gone."""
    run_values["teacher"] |= {"lookahead": lookahead, "batches_per_call": together}
    with Stream(from_dict(run_values), log=tmp_path / "engine.log") as stream:
        (engine,) = local_engines
        step = Running(lambda: engine.calls.count("prefill"))
        for _ in range(together):
            assert not step.seen
            next(stream).release_after(step)
        next(stream).release_after(jnp.zeros(()))
        assert step.seen[:1] == seen


class Running:
    """What a step puts out: notes what ``look`` says whenever it is waited for."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def block_until_ready(self):
        self.seen.append(self.look())

    def is_ready(self):
        return bool(self.seen)

    def __array__(self, dtype=None, copy=None):
        return np.array(0.0)


@pytest.mark.parametrize("colocate", [False, True])
def test_batches_of_one_call_are_those_of_calls_of_their_own(run_values, local_engines, tmp_path, colocate):
    """Three at a time, of five: the same rows, a call for three and one for the rest, and then the data ends. A teacher
    that sleeps between calls wakes for each of them, and not for the steps in between."""

    def rows(**teacher):
        values = run_values | {"teacher": run_values["teacher"] | {"lookahead": 3} | teacher, "colocate": colocate}
        found = []
        with Stream(from_dict(values), log=tmp_path / "engine.log") as stream:
            stream.steps = 5
            stream.attach(SimpleNamespace(number=0))
            for batch in stream:
                stream._step.number += 1
                (hidden,) = batch.arrays.teacher_hidden
                found.append((batch.host.state, np.array(hidden)[batch.host.batch.mask]))
                batch.release_after(jnp.zeros(()))
        calls = local_engines[-1].calls
        assert calls.count("wake") == colocate * calls.count("prefill")
        assert calls.count("sleep") == colocate * (1 + calls.count("prefill"))
        return found, calls.count("prefill")

    (alone, calls), (together, fewer) = rows(), rows(batches_per_call=3)
    assert (len(alone), calls, len(together), fewer) == (5, 5, 5, 2)
    for (state, hidden), (other_state, other) in zip(alone, together, strict=True):
        assert state == other_state and np.array_equal(hidden, other)


def test_a_batch_that_waits_for_a_step_nobody_makes_is_refused(on_policy_values, local_engines, tmp_path):
    on_policy_values["rollout"] |= {"max_staleness": 1}
    config = from_dict(on_policy_values)
    with Stream(config, log=tmp_path / "engine.log") as stream:
        model = make_student(config, stream.mesh)
        algorithm = make_algorithm(config, model, stream.teachers)
        step = make_step(model, algorithm, make_optimizer(config.train, 4), stream.mesh)
        stream.attach(step)
        first, second = next(stream), next(stream)  # the second may be written with the weights before the first's step
        with pytest.raises(UserError, match="batch 3 needs the weights of step 1, and step 0 is the last.*call the st"):
            next(stream)
        step(first), step(second)
        assert next(stream).host.documents


class Number:
    """What a step puts out: not ready until somebody waits for it, or the step is done."""

    def __init__(self, waited, value=0.0):
        self.waited, self.value, self.ready = waited, value, False

    def is_ready(self):
        return self.ready

    def __array__(self, dtype=None, copy=None):
        if not self.ready:
            self.waited.append(self)
        return np.array(self.value)


def test_a_slot_is_leased_again_only_when_the_step_that_read_it_is_done():
    """Three slots: the third batch may be written beside two steps at work, the fourth waits for the older of them."""
    waited, nothing = [], SimpleNamespace(batch=SimpleNamespace(rows=np.zeros((1, 1, 4))), documents=())
    engine = object.__new__(TeacherEngine)
    engine._lent, engine._slots, engine._slot_rows, engine._timeout = deque(), 3, 16, 0.1
    with HiddenPool.create(rows=3 * 16, width=16, dtype="float32") as engine.pool:
        steps, starts = [Number(waited) for _ in range(5)], []

        def batch(number):
            (lease,), _ = engine.consult(nothing)
            starts.append(lease.starts[0])
            engine.release_after(steps[number], lease)
            return list(waited)

        assert batch(0) == batch(1) == batch(2) == []
        assert batch(3) == steps[:1] and starts == [0, 16, 32, 0]
        steps[2].ready, steps[2].value = True, np.nan  # its rows are looked at, and stay
        assert batch(4) == steps[:2] and starts[4] == 16


@pytest.mark.parametrize(("lookahead", "together"), [(1, 1), (4, 1), (4, 4)])
def test_a_loop_that_looks_at_its_steps_late_gets_its_batches(run_values, local_engines, tmp_path, lookahead, together):
    """Its steps are done, and nobody has asked whether they are: their rows are there for the next batches."""
    run_values["teacher"] |= {"lookahead": lookahead, "batches_per_call": together, "timeout": 20}
    with Stream(from_dict(run_values), log=tmp_path / "engine.log") as stream:
        for _ in range(14):
            next(stream).release_after(Late(0.05))


class Late:
    """What a step puts out: ready a little after it was asked for, as a device's work is."""

    def __init__(self, seconds):
        self.at = time.monotonic() + seconds

    def is_ready(self):
        return time.monotonic() > self.at

    def __array__(self, dtype=None, copy=None):
        time.sleep(max(0.0, self.at - time.monotonic()))
        return np.array(0.0)
