"""Being stopped, with real processes and signals: save and leave, leave at once, and who may write to a folder."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from run_tools import ENVIRONMENT, ROOT, losses, servers, start, traces, wait_until, without_teacher, write_config


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
    assert third.returncode == 2 and "SIGTERM: finishing what is in hand, then saving" in shown
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
        from kdjax.training.interrupt import Interrupt

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
    assert process.stdout.readline().startswith("SIGINT: finishing what is in hand, then saving")
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
