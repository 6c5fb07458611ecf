"""What a person is told: the same lines in a terminal and in a log, and seconds that add up."""

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from kdjax.config import from_dict
from kdjax.progress import Display
from kdjax.training.window import Window

CONFIG = {"student": {"path": "none"}, "data": {"train": [{"path": "none"}]}}

VALUES = {
    "loss": 2.5, "kd": 2.25, "ce": 3.5, "grad_norm": 0.75, "loss_tokens": 640.0, "learning_rate": 2e-4,
    "tokens_per_second": 12345.6, "seconds/teacher": 0.3, "seconds/waiting": 0.1, "seconds/transfer": 0.02,
    "seconds/step": 0.5, "seconds/student": 0.38, "pool/used": 0.5,
}  # fmt: skip


def shown(terminal: bool) -> str:
    display, out = Display(), io.StringIO()
    display.console = Console(file=out, force_terminal=terminal, highlight=False, soft_wrap=True, width=300)
    with display.stage("teacher (sglang)"):
        pass
    with display.bar(200):
        display.advance(60, 2.5)
        display.step(60, 200, VALUES)
    return out.getvalue()


def test_a_log_gets_plain_lines():
    lines = shown(terminal=False).splitlines()
    assert lines[0].startswith("teacher (sglang)") and lines[0].endswith("0.0 s")
    assert lines[1:] == [
        "step 60/200  loss 2.5000  kd 2.2500  ce 3.5000  grad 0.75  lr 2.0e-04  12,346 tok/s  "
        "0.50 s/step (waiting 0.10 + transfer 0.02 + student 0.38; teacher 0.30)  eta 0:01:10"
    ]


def test_what_ran_beside_the_step_stands_behind_its_seconds():
    display, out = Display(), io.StringIO()
    display.console = Console(file=out, highlight=False, soft_wrap=True, width=300)
    display.step(60, 200, VALUES | {"seconds/sync": 0.04, "seconds/generate": 0.4, "rollout/hidden": 0.75})
    assert "(waiting 0.10 + transfer 0.02 + student 0.38 + sync 0.04; generate 0.40, 75% hidden; teacher 0.30)" in (
        out.getvalue()
    )


def test_a_window_that_waited_once_less_tells_the_same_step(monkeypatch):
    """The run's first batch was waited for before there were windows: its last one has a wait less than steps."""
    clock = SimpleNamespace(perf_counter=lambda: clock.now, now=0.0)
    monkeypatch.setattr("kdjax.training.window.time", clock)
    window = Window(from_dict(CONFIG), steps=6, done=0)
    batch = SimpleNamespace(
        seconds={"waiting": 0.2, "transfer": 0.05, "teacher": 0.1}, host=SimpleNamespace(tokens=1000)
    )
    found = []
    for waits in (2, 1, 0):
        for _ in range(waits):
            window.took(batch)
            clock.now += 0.25
        for _ in range(2):
            window.done(batch)
            clock.now += 0.75
        found.append(window.close(2 * len(found) + 2))
    wanted = {"waiting": 0.2, "transfer": 0.05, "teacher": 0.1, "student": 0.75, "step": 1.0}
    wanted = {"tokens_per_second": 1000} | {f"seconds/{name}": value for name, value in wanted.items()}
    for values in found:
        del values["learning_rate"]
    assert found[:2] == [pytest.approx(wanted)] * 2
    del wanted["tokens_per_second"]  # without a wait there is no speed
    assert found[2] == pytest.approx(wanted | {"seconds/waiting": 0, "seconds/transfer": 0, "seconds/step": 0.75})


def test_a_step_whose_batch_another_window_waited_for_tells_no_speed():
    window = Window(from_dict(CONFIG), steps=2, done=0)
    batch = SimpleNamespace(seconds={"waiting": 0.1}, host=SimpleNamespace(tokens=640))
    window.took(batch)
    window.done(batch)
    assert window.close(1)["tokens_per_second"] > 0
    window.done(batch)
    values = window.close(2)
    assert "tokens_per_second" not in values and values["seconds/step"] >= 0
    display, out = Display(), io.StringIO()
    display.console = Console(file=out, highlight=False, soft_wrap=True, width=300)
    display.step(2, 2, {"loss": 2.5, "grad_norm": 0.75} | values)
    assert "lr 0.0e+00  0.00 s/step" in out.getvalue()


def test_a_terminal_gets_the_same_lines_and_a_bar():
    out = shown(terminal=True)
    assert "step 60/200  loss 2.5000  kd 2.2500" in out and "eta 0:01:10" in out
    assert "60/200" in out.replace("step 60/200", "") and "\x1b[" in out


def test_seconds_are_given_out_once():
    display = Display(quiet=True)
    with display.stage("load"):
        time.sleep(0.02)
    for _ in range(2):
        with display.timed("evaluation"):
            time.sleep(0.01)
    first = display.spent()
    assert set(first) == {"stage/load", "stage/evaluation"}
    assert 0.02 <= first["stage/load"] < 1 and first["stage/evaluation"] >= 0.02
    assert display.spent() == {}
