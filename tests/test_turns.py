"""Who holds the devices when: the calls that sleeping and waking engines get, in order."""

import pytest

from kdjax.rollouts.turns import Turns


class Engine:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def sleep(self, tags):
        self.log.append(f"{self.name} sleeps: {' '.join(tags)}")

    def wake(self, tags):
        self.log.append(f"{self.name} wakes: {' '.join(tags)}")


def made(**kept):
    log = []
    student, teacher = Engine("student", log), Engine("teacher", log)
    return Turns({"student": [student], "teacher": [teacher]}, kept), log, student


def entered(turns, log, phase):
    log.clear()
    turns.enter(phase)
    return list(log)


def test_a_step_goes_round_and_nobody_is_awake_with_another():
    turns, log, _ = made()
    assert entered(turns, log, "train") == ["student sleeps: kv_cache weights", "teacher sleeps: kv_cache weights"]
    for _ in range(2):
        assert entered(turns, log, "sync") == ["student wakes: weights"]
        assert entered(turns, log, "generate") == ["student wakes: kv_cache"]
        assert entered(turns, log, "prefill") == ["student sleeps: kv_cache weights", "teacher wakes: kv_cache weights"]
        assert entered(turns, log, "train") == ["teacher sleeps: kv_cache weights"]


def test_a_teacher_that_is_an_earlier_self_gets_its_weights_alone_first():
    turns, log, _ = made()
    turns.enter("train")
    turns.enter("sync")
    assert entered(turns, log, "renew") == ["student sleeps: weights", "teacher wakes: weights"]
    assert entered(turns, log, "prefill") == ["teacher wakes: kv_cache"]


def test_what_is_kept_stays():
    turns, log, _ = made(teacher=("weights",))
    assert entered(turns, log, "train") == ["student sleeps: kv_cache weights", "teacher sleeps: kv_cache"]
    assert entered(turns, log, "prefill") == ["teacher wakes: kv_cache"]


def test_an_engine_that_was_started_again_is_put_back_to_where_it_was():
    turns, log, student = made()
    turns.enter("train")
    turns.enter("sync")
    log.clear()
    turns.restarted(student)
    assert log == ["student sleeps: kv_cache"]


def test_no_phase_is_entered_out_of_order():
    turns, _, _ = made()
    turns.enter("train")
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
    turns = Turns({"student": [both], "teacher": [both]})
    assert entered(turns, log, "train") == ["it sleeps: kv_cache weights"]
    assert entered(turns, log, "sync") == ["it wakes: weights"]
    assert entered(turns, log, "generate") == ["it wakes: kv_cache"]
    assert entered(turns, log, "prefill") == []
