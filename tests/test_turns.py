"""Who holds the devices when: the calls that sleeping and waking engines get, in order."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from bridge.errors import EngineError
from kdjax.config import from_dict
from kdjax.rollouts.turns import Turns
from kdjax.training.sources import Stream


class Engine:
    """``fails`` is what its next call does to it: "dies" or "refuses"."""

    def __init__(self, name, log):
        self.name, self.log, self.pid, self.fails = name, log, 1, None

    def wait_ready(self):
        pass

    def sleep(self, tags):
        self._do(f"{self.name} sleeps: {' '.join(tags)}")

    def wake(self, tags):
        self._do(f"{self.name} wakes: {' '.join(tags)}")

    def _do(self, what):
        if self.fails:
            self.pid = None if self.fails == "dies" else 1
            self.fails = None
            raise EngineError(what)
        self.log.append(what)


def made(**kept):
    log = []
    student, teacher = Engine("student", log), Engine("teacher", log)
    turns = Turns(kept)
    turns.join("teacher", [teacher])
    turns.join("student", [student])
    return turns, log, student


def entered(turns, log, phase):
    log.clear()
    turns.enter(phase)
    return list(log)


def test_a_step_goes_round_and_nobody_is_awake_with_another():
    turns, log, _ = made()
    assert log == ["teacher sleeps: kv_cache weights", "student sleeps: kv_cache weights"]
    for _ in range(2):
        assert entered(turns, log, "sync") == ["student wakes: weights"]
        assert entered(turns, log, "generate") == ["student wakes: kv_cache"]
        assert entered(turns, log, "prefill") == ["student sleeps: kv_cache weights", "teacher wakes: kv_cache weights"]
        assert entered(turns, log, "train") == ["teacher sleeps: kv_cache weights"]


def test_a_step_that_was_read_back_and_has_no_row_needs_no_engine():
    turns, log, _ = made()
    entered(turns, log, "sync")
    assert entered(turns, log, "train") == ["student sleeps: weights"]


def test_a_teacher_that_is_an_earlier_self_gets_its_weights_alone_first():
    turns, log, _ = made()
    turns.enter("sync")
    assert entered(turns, log, "renew") == ["student sleeps: weights", "teacher wakes: weights"]
    assert entered(turns, log, "prefill") == ["teacher wakes: kv_cache"]


def test_what_is_kept_stays():
    turns, log, _ = made(teacher=("weights",))
    assert log == ["teacher sleeps: kv_cache", "student sleeps: kv_cache weights"]
    assert entered(turns, log, "prefill") == ["teacher wakes: kv_cache"]


def test_an_engine_that_was_started_again_is_put_back_to_where_it_was():
    turns, log, student = made()
    turns.enter("sync")
    log.clear()
    turns.restarted(student)
    assert log == ["student sleeps: kv_cache"]


def test_weights_are_sent_again_while_another_engine_goes_on_writing():
    turns, log, student = made()
    other, trainer = Engine("other", log), Engine("trainer", log)
    turns.join("student", [other])
    turns.join("trainer", [trainer], awake=["weights"])
    turns.enter("generate")
    turns.restarted(student)
    assert entered(turns, log, "resend") == ["trainer wakes: weights"]
    assert entered(turns, log, "generate") == ["trainer sleeps: weights"]


def test_engines_that_two_threads_start_again_sleep_and_wake_once():
    log, begun, go = [], threading.Event(), threading.Event()

    class Slow(Engine):
        def sleep(self, tags):
            begun.set()
            assert go.wait(10)
            super().sleep(tags)

    slow, other = Slow("slow", log), Engine("other", log)
    turns = Turns()
    turns.enter("train")
    go.set()
    turns.join("student", [slow, other])
    turns.enter("sync")
    for used in (log, begun, go):
        used.clear()
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(turns.restarted, slow)]
        assert begun.wait(10)
        jobs.append(threads.submit(turns.restarted, other))
        time.sleep(0.1)  # the second must wait, not ask the first engine to sleep again
        go.set()
        for job in jobs:
            job.result()
    assert log == ["slow sleeps: kv_cache", "other sleeps: kv_cache"]


def test_the_dead_are_passed_over_until_they_are_started_again():
    turns, log, student = made()
    student.fails = "dies"  # while it is to wake
    assert entered(turns, log, "sync") == []
    assert entered(turns, log, "generate") == []
    assert entered(turns, log, "prefill") == ["teacher wakes: kv_cache weights"]
    student.pid = 1
    turns.restarted(student)
    assert log[1:] == ["student sleeps: kv_cache weights"]
    assert entered(turns, log, "train") == ["teacher sleeps: kv_cache weights"]
    assert entered(turns, log, "generate") == ["student wakes: kv_cache weights"]


def test_a_call_that_fails_leaves_the_others_where_they_are():
    """asked again, nobody sleeps twice and nobody wakes twice"""
    turns, log, student = made()
    turns.enter("generate")
    turns.enter("prefill")
    student.fails = "refuses"
    turns.enter("train")
    with pytest.raises(EngineError, match="student wakes"):
        turns.enter("generate")
    assert entered(turns, log, "generate") == ["student wakes: kv_cache weights"]


def test_what_is_to_stay_resident_stays_outside_its_turn():
    values = {"student": {"path": "s"}, "teacher": {"path": "t", "resident": ["weights"]}, "colocate": True}
    values |= {"data": {"train": [{"path": "rows.jsonl"}]}, "rollout": {"resident": ["kv_cache"]}}
    log, stream = [], object.__new__(Stream)
    stream.config, stream._rollouts, stream.self_teacher = from_dict(values), None, None
    stream.engine = SimpleNamespace(remote=Engine("teacher", log), wait_ready=lambda: None)
    stream.attach(SimpleNamespace())
    stream.turns.join("student", [Engine("student", log)])
    assert log == ["teacher sleeps: kv_cache", "student sleeps: weights"]


def test_no_phase_is_entered_out_of_order():
    turns, _, _ = made()
    turns.enter("prefill")
    with pytest.raises(ValueError, match="generate cannot follow prefill"):
        turns.enter("generate")


def test_without_engines_there_are_no_turns():
    turns = Turns()
    turns.enter("prefill")
    turns.enter("generate")
    assert turns.phase == "train"


def test_one_engine_in_both_roles_stays_awake_between_them():
    log = []
    both = Engine("it", log)
    turns = Turns()
    turns.join("teacher", [both])
    turns.join("student", [both])
    assert log == ["it sleeps: kv_cache weights"]
    assert entered(turns, log, "sync") == ["it wakes: weights"]
    assert entered(turns, log, "generate") == ["it wakes: kv_cache"]
    assert entered(turns, log, "prefill") == []
