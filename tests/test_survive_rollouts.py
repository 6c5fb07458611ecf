"""An engine of the student's dies or hangs as it writes, or is dead when it is to wake: every prompt is answered."""

import os
import signal
import threading

import numpy as np
import pytest
from run_tools import Watcher, go, losses, traces, wait_until
from test_on_policy import rollouts

from kdjax.engines import started
from kdjax.rollouts.engines import StudentEngines

pytestmark = pytest.mark.usefixtures("devices_as_asked")


@pytest.fixture(scope="module")
def undisturbed():
    """what a run wrote and lost that nothing happened to"""
    return {}


def reference(undisturbed, values, tmp_path):
    if not undisturbed:
        go(values, output=str(tmp_path / "undisturbed"))
        undisturbed |= {"losses": losses(tmp_path / "undisturbed"), "rollouts": written(tmp_path / "undisturbed")}
    return undisturbed


def written(run):
    return [(number, rollout) for number in range(1, 7) for rollout in rollouts(run, number)]


def before_writing(monkeypatch, strike):
    """call ``strike[version](engine)`` as the engine is about to write with the weights of that version"""
    draw = StudentEngines.generate

    def struck(self, prompts, seeds):
        strike.pop(self.version, lambda engine: None)(self.engines[0])
        return draw(self, prompts, seeds)

    monkeypatch.setattr(StudentEngines, "generate", struck)


def freeze(engine):
    os.kill(engine.pid, signal.SIGSTOP)


def freeze_and_kill(engine):
    """frozen first, so that it dies with the prompts in its hands"""
    freeze(engine)
    threading.Timer(0.5, os.kill, (engine.pid, signal.SIGKILL)).start()


@pytest.mark.parametrize("kind", ["transformers", pytest.param("sglang", marks=pytest.mark.full)])
def test_killed_or_hung_as_it_writes(
    on_policy_values, tmp_path, undisturbed, local_engines, monkeypatch, temporary, kind
):
    expected = reference(undisturbed, on_policy_values, tmp_path)
    monkeypatch.setattr("kdjax.rollouts.engines.started", started)  # the student's in a process of its own
    before_writing(monkeypatch, {1: freeze_and_kill, 3: freeze})
    on_policy_values["rollout"] |= {"engine": kind, "threads": 1, "timeout": 5.0}
    if kind == "sglang":
        on_policy_values["rollout"] |= {"args": {"max_total_tokens": 4096}}
    display = Watcher()
    go(on_policy_values, display)
    killed, hung = (line for line in display.lines if "starting it again, 1 of 3" in line)
    assert "died (signal SIGKILL) during generate" in killed
    assert "gave no answer to generate within 5 s and was stopped" in hung
    found, run = written(tmp_path / "run"), tmp_path / "run"
    asked = [(number, r["prompt"], r["sample"], r["seed"], r["version"]) for number, r in found]
    assert asked == [(n, r["prompt"], r["sample"], r["seed"], r["version"]) for n, r in expected["rollouts"]]
    assert [version for *_, version in asked] == [number - 1 for number, *_ in asked]
    # Written by the very weights of that version: with those of another, k3 is a thousand times as large.
    assert max(losses(run, "rollout/k3")) < 1e-6
    if kind == "transformers":  # SGLang's sampling does not repeat
        assert [r["ids"] for _, r in found] == [r["ids"] for _, r in expected["rollouts"]]
        assert losses(run) == pytest.approx(expected["losses"], rel=1e-4)
    wait_until(lambda: not traces(os.getpid(), temporary), 10)


@pytest.mark.parametrize("call", ["sleep", "wake"])
def test_dead_when_its_turn_comes(on_policy_values, tmp_path, undisturbed, local_engines, monkeypatch, call):
    """with shared devices, where a step puts each engine to sleep and wakes it: the student's and the teacher's"""
    expected = reference(undisturbed, on_policy_values, tmp_path)
    local_engines.clear()

    def strike(engine):
        for other in local_engines:
            other.deaths.append(call)

    before_writing(monkeypatch, {2: strike})
    display = Watcher()
    go(on_policy_values, display, colocate=True)
    assert [engine.starts for engine in local_engines] == [2, 2]
    assert losses(tmp_path / "run") == expected["losses"]  # to the bit
    assert sum("starting it again, 1 of 3" in line for line in display.lines) == 2


def test_a_step_without_a_response_to_learn_from(on_policy_values, tmp_path, local_engines):
    """every response is cut and dropped: nothing is asked of the teacher, and the student stays as it is"""
    on_policy_values["rollout"] |= {"max_new_tokens": 1, "truncated": "drop", "prompts": 2}
    on_policy_values["train"] |= {"steps": 2}
    display = Watcher()
    go(on_policy_values, display)
    assert losses(tmp_path / "run") == [0.0, 0.0]
    teacher = local_engines[0].calls
    assert teacher.count("prefill") == 1  # of the preflight
    assert len([line for line in display.lines if "were cut at rollout.max_new_tokens=1" in line]) == 2
    assert np.isfinite(losses(tmp_path / "run", "grad_norm")).all()
