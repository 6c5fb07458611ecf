"""The teacher dies, hangs, is slow, has no rows left: the run goes on with the right rows, or ends with one error."""

import os
import signal
import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import processes
import pytest
from run_tools import Watcher, go, losses, servers, traces, wait_until, write_config

from bridge import client
from bridge.errors import EngineError
from kdjax.config import from_dict
from kdjax.engines import Revived
from kdjax.errors import UserError
from kdjax.train import main
from kdjax.training.loop import train
from kdjax.training.sources import Stream

pytestmark = pytest.mark.usefixtures("devices_as_asked")


@pytest.fixture(autouse=True)
def nothing_is_left(temporary):
    yield
    wait_until(lambda: not traces(os.getpid(), temporary), 10)


@pytest.fixture
def values(run_values):
    run_values["data"]["eval"] = []
    run_values["train"] = {"steps": 6, "batch_size": 4, "learning_rate": 3e-3}
    run_values["teacher"] |= {"preflight": False, "threads": 1}
    return run_values


@pytest.fixture(scope="module")
def undisturbed():
    """losses by engine kind of a run that nothing happens to"""
    return {}


def reference(undisturbed, values, tmp_path):
    kind = values["teacher"]["engine"]
    if kind not in undisturbed:
        go(values, output=str(tmp_path / "undisturbed"))
        undisturbed[kind] = losses(tmp_path / "undisturbed")
    return undisturbed[kind]


def stop_then(signal_number, find):
    """freeze a process of the engine, so that a batch is surely under way in it, then strike"""

    def strike():
        (victim,) = find()
        os.kill(victim, signal.SIGSTOP)
        if signal_number is not None:
            threading.Timer(0.5, os.kill, (victim, signal_number)).start()

    return strike


def schedulers():
    """SGLang's scheduler processes below our server"""
    (server,) = servers()
    return processes.schedulers(server)


def test_an_engine_killed_or_hung_in_a_batch_is_started_again_and_the_batch_sent_again(values, tmp_path, undisturbed):
    expected = reference(undisturbed, values, tmp_path)
    values["teacher"] |= {"timeout": 3.0}
    display = Watcher({1: stop_then(signal.SIGKILL, servers), 3: stop_then(None, servers)})
    go(values, display)
    killed, hung = (line for line in display.lines if "starting it again" in line)
    assert "died (signal SIGKILL) during prefill" in killed
    assert f"1 of 3 (log: {values['output']}/engine.log)" in killed
    assert "gave no answer to prefill within 3 s and was stopped; starting it again" in hung
    assert losses(values["output"]) == expected  # to the bit
    assert losses(values["output"], "teacher/restarts")[-1] == 2


def test_an_engine_that_keeps_dying_ends_the_run_with_one_error(values, tmp_path, capfd):
    values["teacher"] |= {"restarts": 1}
    values["checkpoint"] |= {"save_every": 2}
    stop, struck = threading.Event(), []

    def strike_always():
        while not stop.is_set():
            for pid in servers():
                struck.append(pid)
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    display = Watcher({3: threading.Thread(target=strike_always).start})
    with pytest.raises(EngineError) as caught:
        go(values, display)
    stop.set()
    message = str(caught.value)
    assert "died (signal SIGKILL)" in message and f"last lines of {values['output']}/engine.log" in message
    assert "started again 1 times; teacher.restarts" in message
    assert len(set(struck)) == 2  # the first and the one that was started again
    # What was saved before is whole: the same command goes on.
    assert go(values, Watcher()).steps == 6


def test_an_engine_that_is_slow_to_start_is_one_error(values, tmp_path, capfd):
    values["teacher"] |= {"start_timeout": 0.5}
    assert main(["--config", str(write_config(tmp_path, values))]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: engine transformers model gave no answer to starting within 0.5 s and was stopped")
    assert f"{values['output']}/engine.log" in error and "Traceback" not in error


def test_a_fault_that_would_come_again_is_not_answered_by_a_restart(values, tmp_path):
    """a prompt that the engine refuses, and a pool without free rows"""
    values["teacher"] |= {"timeout": 1.0}
    told = []
    with Stream(from_dict(values), log=tmp_path / "engine.log", tell=told.append) as stream:
        stream.wait_ready()
        pid = servers()
        with pytest.raises(UserError, match="^teacher .*: a prompt is an int32 NumPy array"):
            stream.engine.revived.ask(lambda engine: engine.score([[1, 2]]))
        with stream.engine.pool.lease([stream.engine.pool.spec.rows], timeout=1):
            with pytest.raises(EngineError, match="rows waited 1 s for the hidden pool: 0 of .* rows are free"):
                next(stream)
        assert servers() == pid and stream.engine.restarts == 0 and not told


def test_a_refused_request_is_raised_and_not_repeated():
    class Living:
        pid = 1

    asked = []

    def question(engine):
        asked.append(engine)
        raise EngineError("SGLang gave up prompt 3: too long")

    with pytest.raises(EngineError, match="gave up prompt 3"):
        Revived(Living(), 3, print).ask(question)
    assert len(asked) == 1


def test_an_engine_that_another_thread_has_started_again_is_asked_and_not_started_once_more():
    engine, told = SimpleNamespace(pid=1, log="engine.log"), []

    def question(engine):
        if engine.pid == 1:
            engine.pid = 2
            raise EngineError("engine died\nlog")
        return engine.pid

    assert Revived(engine, 1, told.append).ask(question) == 2
    assert told == ["engine died; starting it again, 1 of 1 (log: engine.log)"]


def test_nobody_starts_an_engine_again_behind_the_end_of_the_run():
    """two threads find it dead; while one starts it again, in vain, the run ends, and the other waits for its turn"""
    started, ended = threading.Event(), threading.Event()

    def restart():
        started.set()
        ended.wait(10)
        raise EngineError("engine is closed")

    engine = SimpleNamespace(pid=1, log="log", spec=SimpleNamespace(model="m"))
    engine.restart, waiting, raised = Mock(side_effect=restart), threading.Barrier(2, timeout=10), []

    def question(engine):
        waiting.wait()
        engine.pid = None
        raise EngineError("engine died")

    def ask():
        with pytest.raises(EngineError) as caught:
            revived.ask(question)
        raised.append(str(caught.value))

    told: list[str] = []
    revived = Revived(engine, 3, told.append)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    wait_until(lambda: len(told) == 2, 10)  # behind this only the turn is waited for
    revived.end()
    ended.set()
    for thread in threads:
        thread.join(10)
    assert engine.restart.call_count == 1 and sorted(raised) == ["engine is closed", "teacher m is closed"]


def test_an_engine_that_is_closed_while_it_is_started_again_does_not_stay(tiny_teacher, tmp_path, monkeypatch):
    class Server:
        process, spawned = SimpleNamespace(pid=1), []

        def __init__(self, spec, log):
            Server.spawned.append(self)
            self.work, self.destroyed = None, 0
            if len(Server.spawned) == 2:
                engine.kill()  # when there is no server yet to be killed

        def destroy(self):
            self.destroyed += 1

    monkeypatch.setattr(client, "_Server", Server)
    monkeypatch.setattr(client.RemoteEngine, "_send", lambda *_: None)
    engine = client.start_engine(tiny_teacher, kind="transformers", device="cpu", log=tmp_path / "log", wait=False)
    with pytest.raises(EngineError, match="is closed"):
        engine.restart()
    assert [server.destroyed for server in Server.spawned] == [1, 1] and engine.pid is None


@pytest.mark.full
def test_sglang_survives_the_death_of_its_scheduler(values, tmp_path, undisturbed):
    values["teacher"] |= {"engine": "sglang"}
    expected = reference(undisturbed, values, tmp_path)
    display = Watcher({2: stop_then(signal.SIGKILL, schedulers)})
    go(values, display)
    assert sum("starting it again, 1 of 3" in line for line in display.lines) == 1
    assert losses(values["output"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.full
def test_sglang_interrupted_equals_uninterrupted(values, tmp_path, monkeypatch):
    values["teacher"] |= {"engine": "sglang"}
    values["checkpoint"] |= {"save_every": 2}
    asked, consult = {}, Stream._consult

    def note(self, host):
        """which documents the teacher is asked about for each step of each run"""
        steps = asked.setdefault(self.config.output, {})
        steps[host.state["statistics"]["batches"]] = [placed.document.ids.tolist() for placed in host.documents]
        return consult(self, host)

    def fail():
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "_consult", note)
    whole = str(tmp_path / "whole")
    go(values, output=whole)
    with pytest.raises(KeyboardInterrupt):
        train(from_dict(values), Watcher({5: fail}))
    del asked[values["output"]]
    go(values)
    assert losses(values["output"]) == pytest.approx(losses(whole), rel=1e-5)
    again = asked[values["output"]]  # the second life asks from step 5 on, and for the same documents
    assert min(again) == 5 and [again[n] for n in (5, 6)] == [asked[whole][n] for n in (5, 6)]
