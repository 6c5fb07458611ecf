"""Does a trace of a few steps appear where it is asked for, and does the run stay the same?"""

import gzip
import json

import pytest
from run_tools import Watcher, go, losses, without_teacher

from kdjax.errors import UserError
from kdjax.train import PROFILED, parse
from kdjax.training.profile import WARM_UP, Profiler
from kdjax.training.step import Step

pytestmark = pytest.mark.usefixtures("devices_as_asked")


def test_a_traced_run_is_the_same_run(run_values, tmp_path, monkeypatch):
    """It also shows that a step's numbers are looked at once the next step is on its way."""
    without_teacher(run_values)
    run_values["data"].pop("eval")
    run_values["train"] |= {"eval_every": None, "eval_rows": None, "steps": 7}
    go(run_values)
    dispatched, seen = [], {}

    def counted(step, batch, call=Step.__call__):
        dispatched.append(batch)
        return call(step, batch)

    class Late(Watcher):
        def advance(self, step, loss):
            seen[step] = len(dispatched)

    monkeypatch.setattr(Step, "__call__", counted)
    watcher = Late()
    traced = run_values | {"output": str(tmp_path / "traced"), "log": run_values["log"] | {"profile": 2}}
    go(traced, watcher)
    assert losses(tmp_path / "run") == losses(tmp_path / "traced")
    assert seen == {number: min(number + 1, 7) for number in range(1, 8)}
    assert not (tmp_path / "run" / "profile").exists()
    (file,) = (tmp_path / "traced" / "profile").rglob("*.trace.json.gz")
    assert any("trace of steps 4 to 5" in line and str(file) in line for line in watcher.lines)
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = {event["name"]: event for event in events if "name" in event}
    assert {"step 4", "step 5"} <= named.keys() or {"step"} <= named.keys()
    assert {"wait for a batch", "wait for the step"} <= named.keys()


@pytest.mark.parametrize(
    ("steps", "done", "last", "first", "until"),
    [
        (2, 0, 100, WARM_UP + 1, WARM_UP + 2),
        (5, 40, 100, WARM_UP + 41, WARM_UP + 45),
        (5, 0, 6, 2, 6),
        (5, 8, 9, 10, 9),
    ],
)
def test_warm_up_comes_first_where_there_is_room(tmp_path, steps, done, last, first, until):
    profiler = Profiler(tmp_path, steps, done, last, print)
    assert (profiler.first, profiler.last) == (first, until)


@pytest.mark.parametrize("written", [True, False])
def test_a_run_that_fails_early_says_what_was_traced_if_anything(tmp_path, monkeypatch, written):
    def stop():
        if written:
            (tmp_path / "plugins" / "profile" / "now").mkdir(parents=True)
            (tmp_path / "plugins" / "profile" / "now" / "host.trace.json.gz").touch()

    monkeypatch.setattr("jax.profiler.start_trace", lambda *_, **__: None)
    monkeypatch.setattr("jax.profiler.stop_trace", stop)
    told = []
    with pytest.raises(UserError, match="what went wrong"), Profiler(tmp_path, 5, 0, 100, told.append) as profiler:
        for number in range(1, 7):
            profiler.step(number)
        raise UserError("what went wrong")
    assert [line.partition(":")[0] for line in told] == (["trace of steps 4 to 6"] if written else [])


def test_the_option_is_short_for_the_key(root, capsys):
    config = str(root / "configs" / "quickstart.yaml")
    assert parse(["--config", config, "--profile"]).log.profile == PROFILED
    assert parse(["--config", config, "--profile", "log.profile=9"]).log.profile == 9
    assert parse(["--config", config]).log.profile == 0
