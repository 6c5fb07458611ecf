"""Being stopped, with real processes and signals: save and leave, leave at once, and who may write to a folder."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from run_tools import (
    ENVIRONMENT,
    ROOT,
    Watcher,
    contents,
    go,
    losses,
    servers,
    start,
    traces,
    wait_until,
    without_teacher,
    write_config,
)

from kdjax import evaluate
from kdjax.config import from_dict
from kdjax.errors import UserError
from kdjax.interrupt import Interrupt, Interrupted
from kdjax.rollouts.overlap import Waits
from kdjax.rollouts.stream import RolloutStream
from kdjax.rollouts.turns import Turns
from kdjax.training import loop
from kdjax.training.ahead import Ahead
from kdjax.training.sources import LOG_RATIO, Stream


@pytest.fixture
def values(run_values):
    """a run that never ends by itself"""
    run_values["data"]["eval"] = []
    run_values["train"] = {"steps": 100_000, "batch_size": 4, "learning_rate": 1e-3}
    run_values["teacher"] |= {"preflight": False, "threads": 1}
    return run_values


def trains(process, values, past=0):
    """wait until the run has written more than ``past`` losses"""
    run = Path(values["output"])

    def look():
        assert process.poll() is None, process.stderr.read()
        return (run / "metrics.jsonl").exists() and len(losses(run)) > past

    wait_until(look, 120)


def test_a_second_run_is_refused_a_dead_runs_lock_goes_and_a_signal_saves(values, tmp_path):
    file = write_config(tmp_path, without_teacher(values))
    first = start("--config", file)
    trains(first, values)
    second = start("--config", file)
    _, error = second.communicate(timeout=120)
    assert second.returncode == 2 and error.count("\n") == 1 and "another run writes there" in error
    first.kill()
    first.communicate()
    (Path(values["output"]) / "metrics.jsonl").unlink()  # so that what comes is the next run's
    third = start("--config", file)
    trains(third, values)
    third.send_signal(signal.SIGTERM)
    shown, error = third.communicate(timeout=120)
    assert third.returncode == 2 and "SIGTERM: saving what there is, then leaving" in shown
    assert error.startswith("error: SIGTERM: saved step ") and "run the same command again to go on" in error
    assert len(list((Path(values["output"]) / "checkpoints").iterdir())) == 1


def test_a_signal_while_the_teacher_hangs_saves_and_leaves_nothing(values, tmp_path, temporary):
    process = start("--config", write_config(tmp_path, values), temporary=temporary)
    trains(process, values, 3)
    (server,) = servers(process.pid)
    os.kill(server, signal.SIGSTOP)
    time.sleep(1.0)  # by now the run waits for it
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.startswith("error: SIGINT: saved step ")
    assert (Path(values["output"]) / "checkpoints" / error.split()[4].rstrip(";")).is_dir()
    wait_until(lambda: not traces(process.pid, temporary) and not Path(f"/proc/{server}").exists(), 10)


def test_a_second_ctrl_c_leaves_at_once_in_the_middle_of_a_step(tmp_path):
    script = """
        import jax
        from kdjax.interrupt import Interrupt

        step = jax.jit(lambda x: jax.lax.fori_loop(0, 2**31 - 1, lambda i, v: v * 0.999 + 0.001, x))
        with Interrupt(lambda text: print(text, flush=True), lambda: print("at once", flush=True)):
            print("begun", flush=True)
            step(1.0).block_until_ready()
        print("done")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("SIGINT: saving what there is, then leaving")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (130, "at once\n") and time.monotonic() - began < 2


def test_a_second_ctrl_c_takes_a_hung_engine_along(values, tmp_path, temporary):
    """SIGINT twice at once: nothing is saved, and still nothing is left"""
    process = start("--config", write_config(tmp_path, values), temporary=temporary)
    trains(process, values, 2)
    (server,) = servers(process.pid)
    os.kill(server, signal.SIGSTOP)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    process.communicate(timeout=30)
    assert process.returncode == 130
    wait_until(lambda: not traces(process.pid, temporary) and not Path(f"/proc/{server}").exists(), 10)


def strike(*_):
    signal.raise_signal(signal.SIGTERM)
    time.sleep(60)


def test_what_is_breakable_is_broken_off_once_and_the_rest_is_told():
    handler, cleaned = signal.getsignal(signal.SIGTERM), []
    with Interrupt(print, print) as interrupt:
        with pytest.raises(Interrupted, match="^SIGTERM$"), interrupt.breakable():
            try:
                strike()
            finally:
                signal.raise_signal(signal.SIGTERM)
                cleaned.append(True)
    assert cleaned and signal.getsignal(signal.SIGTERM) is handler
    with Interrupt(print, print) as interrupt:
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked == "SIGTERM"
        with pytest.raises(Interrupted), interrupt.breakable():
            pytest.fail("it came before")


def test_a_signal_in_start_up_leaves_nothing(run_values, tmp_path, temporary, devices_as_asked, monkeypatch):
    """while the teacher's engine starts"""
    monkeypatch.setattr(loop, "make_student", strike)
    with pytest.raises(UserError, match="^SIGTERM: nothing new to save; run the same command again$"):
        go(run_values)
    assert set(contents(tmp_path / "run")) == {"engine.log"}
    wait_until(lambda: not traces(os.getpid(), temporary), 10)


def test_sigterm_ends_an_evaluation_and_its_engine(run_values, tmp_path, temporary, devices_as_asked, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Stream, "wait_ready", strike)
    model = run_values["student"]["path"]
    assert evaluate.main(["--config", str(write_config(tmp_path, run_values)), "--model", model]) == 130
    assert signal.getsignal(signal.SIGTERM) is handler
    wait_until(lambda: not traces(os.getpid(), temporary), 10)


def test_a_signal_in_the_last_evaluation_or_the_report(run_values, tmp_path, devices_as_asked, monkeypatch):
    """without a step, which would have to be compiled"""
    numbers = [{"ce": 2.0}]

    def train(self, done):
        self.run_folder.keep()
        self.result.steps, self.position = 1, self.stream.state()

    monkeypatch.setattr(loop._Run, "_loop", train)
    monkeypatch.setattr(loop, "Evaluator", lambda *_: lambda *_: numbers.pop() if numbers else strike())
    run_values["log"]["report"] = True
    with pytest.raises(UserError, match="^SIGTERM: saved step 1; run the same command again to go on$"):
        go(without_teacher(run_values))
    assert (tmp_path / "run" / "checkpoints" / "1" / "student").is_dir()

    def finish(self):
        self.finished = True

    monkeypatch.setattr(loop._Run, "_finish", finish)
    monkeypatch.setattr(loop._Run, "_report", strike)
    numbers.append({"ce": 2.0})
    display = Watcher()
    with pytest.raises(UserError, match="^SIGTERM: the run is finished, its report is not; python -m kdjax.report"):
        go(without_teacher(run_values), display)
    assert [line for line in display.lines if line.startswith("resume from step 1")]


@pytest.fixture
def starting(on_policy_values, tiny_teacher, temporary, devices_as_asked, monkeypatch):
    """a stream whose two engines, the teacher's and the student's, have only just been started"""
    monkeypatch.setattr("kdjax.rollouts.engines.export_student", lambda *_: tiny_teacher)
    stream = Stream(from_dict(on_policy_values))
    stream.attach(SimpleNamespace(model=None))
    assert len(servers()) == 2
    return stream


def test_leaving_at_once_takes_hung_engines_of_the_student_along(starting, temporary):
    for server in servers():
        os.kill(server, signal.SIGSTOP)
    starting.kill()
    wait_until(lambda: not traces(os.getpid(), temporary), 10)
    starting.close()


def test_closing_leaves_nothing_where_the_last_step_cannot_be_written_down(starting, temporary):
    def full(*_):
        raise OSError("no space")

    starting.data.learned = full
    starting._taken = SimpleNamespace(by_row={LOG_RATIO: jnp.zeros(1)}, host=None)
    with pytest.raises(OSError, match="no space"):
        starting.close()
    wait_until(lambda: not traces(os.getpid(), temporary), 10)


def hanging(hangs, **more):
    """as much of a stream as ``take`` needs; ``hangs`` says what does, until the engines are killed"""
    begun, killed, ended = threading.Event(), threading.Event(), []

    def until_killed():
        begun.set()
        assert killed.wait(30)
        time.sleep(0.1)
        ended.append(hangs)

    does = dict.fromkeys(("produce", "follow"), lambda: None) | {hangs: until_killed}
    stream = Stream.__new__(Stream)
    stream.data = stream._rollouts = RolloutStream.__new__(RolloutStream)
    stream.turns, stream._waits = Turns(), Waits()
    stream._rollouts.engines = SimpleNamespace(follow=does["follow"], kill=killed.set)
    rollouts = dict(distill=SimpleNamespace(on_policy_fraction=1.0), rollout=SimpleNamespace(max_staleness=0))
    stream.config = SimpleNamespace(colocate=False, train=SimpleNamespace(**more), **rollouts)
    stream.engine = stream.self_teacher = stream._taken = stream._step = None
    stream._begun, stream.steps = True, None
    stream._worker, stream._sender = Ahead(does["produce"], 0), Ahead(stream._send, 0)
    return stream, begun.is_set, ended


@pytest.mark.parametrize("hangs", ["produce", "follow"])
def test_engines_that_write_or_take_weights_are_given_up(hangs):
    stream, begun, ended = hanging(hangs, offload=())
    assert stream.take(begun) is None and not ended
    stream.kill()


@pytest.mark.parametrize("hangs", ["produce", "follow"])
def test_parameters_that_wait_on_the_host_are_saved_once_nobody_moves_them(hangs):
    stream, begun, ended = hanging(hangs, offload=("parameters",))
    assert stream.take(begun) is None and ended == [hangs]
