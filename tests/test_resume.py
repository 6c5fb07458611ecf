"""Runs that were killed, damaged checkpoints, other numbers of devices: training goes on as if nothing had been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from run_tools import ENVIRONMENT, ROOT, Watcher, go, losses, without_teacher, write_config

from kdjax.config import CheckpointConfig
from kdjax.errors import UserError
from kdjax.export import export
from kdjax.models import load_model
from kdjax.training import loop
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.preflight import Checked

pytestmark = pytest.mark.usefixtures("devices_as_asked")


@pytest.fixture
def values(run_values):
    run_values["data"]["eval"] = []
    run_values["train"] = {"steps": 6, "batch_size": 4, "learning_rate": 3e-3}
    run_values["checkpoint"] |= {"save_every": 2, "keep": 3}
    return without_teacher(run_values)


def killed(values, tmp_path, kills):
    values["train"] |= {"steps": 60}
    values["data"] |= {"max_len": 64, "on_long_row": "truncate"}
    file = write_config(tmp_path, values)
    command = [sys.executable, str(ROOT / "tests" / "lives.py"), str(file), str(kills), "0"]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=500)
    log = (tmp_path / "run.log").read_text()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["codes"] == [*[-signal.SIGKILL] * kills, 0], log
    # At least one kill struck a checkpoint half-written, and one a run that had not begun to train.
    assert {"save", "start-up"} | ({"export"} if kills > 3 else set()) <= set(told["struck"]), told
    go(values, output=str(tmp_path / "whole"))
    assert losses(values["output"]) == losses(tmp_path / "whole")
    assert "damaged" not in log
    left = [p.name for p in Path(values["output"]).rglob("*") if "tmp" in p.name or p.name.startswith(".")]
    assert left == [".lock"]


def test_killed_three_times_it_ends_with_the_same_losses(values, tmp_path):
    killed(values, tmp_path, 3)


@pytest.mark.full
def test_killed_ten_times_it_ends_with_the_same_losses(values, tmp_path):
    killed(values, tmp_path, 10)


def test_a_run_goes_on_from_what_a_signal_saved(values, tmp_path):
    values["checkpoint"]["save_every"] = None
    go(values, output=str(tmp_path / "whole"))
    with pytest.raises(UserError, match="^SIGTERM: saved step 4; run the same command again to go on$"):
        go(values, Watcher({3: lambda: signal.raise_signal(signal.SIGTERM)}))
    display = Watcher()
    go(values, display)
    assert any(line.startswith("resume from step 4") for line in display.lines)
    assert losses(values["output"]) == losses(tmp_path / "whole")


def test_who_asks_for_a_save_does_not_wait_for_it(tmp_path, monkeypatch):
    """held in the thread that writes it"""
    entered, goes_on, finalize = threading.Event(), threading.Event(), ocp.CompositeCheckpointHandler.finalize

    def held(*arguments):
        entered.set()
        goes_on.wait(10)
        finalize(*arguments)

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", held)
    state = {"params": {"student": {"w": jnp.ones(3)}, "extra": {}}, "step": jnp.int32(1)}
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state, {})
        assert entered.wait(10) and not (tmp_path / "1").exists()
        goes_on.set()
        checkpoints.wait()
        assert (tmp_path / "1").is_dir()


def cut(folder):
    """half of the largest file of the checkpoint is missing"""
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(folder):
    """one bit of the largest file"""
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def part_missing(folder):
    shutil.rmtree(folder / "rest")


def meta_missing(folder):
    shutil.rmtree(folder / "meta")


@pytest.mark.parametrize("damage", [cut, flip, part_missing, meta_missing])
def test_a_damaged_checkpoint_is_passed_over_and_said(values, damage):
    go(values)
    run = Path(values["output"])
    before = losses(run)
    shutil.rmtree(run / "export")
    damage(run / "checkpoints" / "6")
    display = Watcher()
    assert go(values, display).steps == 6
    (told,) = [line for line in display.lines if "is damaged (" in line]
    assert told.startswith("checkpoint of step 6 is damaged (") and told.endswith("going on from step 4")
    assert losses(run) == before
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert [p.name.partition("-")[0] for p in (run / "damaged").iterdir()] == ["6"]


def test_no_whole_checkpoint_is_one_line(values):
    values["checkpoint"]["keep"] = 1
    go(values)
    run = Path(values["output"])
    shutil.rmtree(run / "export")
    cut(run / "checkpoints" / "6")
    with pytest.raises(UserError, match="no whole checkpoint .step 6: .*start anew with overwrite=true") as caught:
        go(values)
    assert "\n" not in str(caught.value)
    assert (run / "checkpoints" / "6").is_dir() and not (run / "damaged").exists()


def test_a_checkpoint_of_eight_devices_goes_on_with_four_and_with_one(values, sharded_values, tmp_path):
    values["train"]["batch_size"] = 8
    go(values, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    run = Path(values["output"])
    first = losses(run)
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints" / "6")
    for name, mesh in {"four": {"data": 1, "fsdp": 4}, "one": {"data": 1}}.items():
        shutil.copytree(run, tmp_path / name)
        display = Watcher()
        go(values, display, output=str(tmp_path / name), mesh=mesh)
        assert any("resume from step 4" in line for line in display.lines)
        assert losses(tmp_path / name) == pytest.approx(first, rel=1e-5)


def test_eight_devices_take_over_from_four_with_other_micro_batches_and_remat(values, sharded_values, tmp_path):
    """eight rows in two micro-batches fit four devices and not eight, so one must be able to say otherwise"""
    values["train"] |= {"batch_size": 8, "accumulate": 2}
    go(values, mesh={"data": 1, "fsdp": 4})
    run = Path(values["output"])
    first = losses(run)
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints" / "6")
    with pytest.raises(UserError, match="8 data shards"):
        go(values, mesh={"data": 1, "fsdp": 8})
    values["train"]["accumulate"] = 1
    go(values, mesh={"data": 1, "fsdp": 8}, student=values["student"] | {"remat": "full"})
    assert losses(run) == pytest.approx(first, rel=1e-5)


def test_overwriting_replaces_the_run_and_a_finished_one_is_not_repeated(values):
    go(values)
    run = Path(values["output"])
    with pytest.raises(UserError, match="holds this run, finished, its student in .*/export; .*overwrite=true"):
        go(values)
    (run / "export" / "note.txt").write_text("of the first run")
    values["train"]["steps"] = 4
    go(values, overwrite=True)
    assert not (run / "export" / "note.txt").exists() and len(losses(run)) == 4
    assert {p.name for p in run.iterdir() if p.name.startswith(".")} == {".lock"}


def test_an_overwriting_run_that_is_killed_before_it_trains_gives_the_first_one_back(values):
    """SIGKILL between setting the old run aside and the first step, as left on disk"""
    go(values)
    run = Path(values["output"])
    before = {p.name for p in run.iterdir()}
    aside = run / ".replaced"
    aside.mkdir()
    for entry in list(run.iterdir()):
        if entry.name not in (".lock", ".replaced"):
            entry.rename(aside / entry.name)
    (run / "config.yaml").write_text("output: half a start\n")
    with pytest.raises(UserError, match="holds this run, finished"):
        go(values)
    assert {p.name for p in run.iterdir()} == before


def test_an_export_that_is_not_the_student_is_said_and_kept(values, monkeypatch):
    """at the very end, when everything is written"""
    fault = UserError("the export differs by 0.5 nats")
    monkeypatch.setattr(loop, "check_export", lambda *_: Checked(0.5, [], fault))
    values["checkpoint"]["check_export"] = True
    with pytest.raises(UserError, match="differs by 0.5 nats"):
        go(values)
    run = Path(values["output"])
    assert json.loads((run / "result.json").read_text())["steps"] == 6
    assert json.loads((run / "run.json").read_text())["export_gap"] == 0.5
    assert load_model(run / "export").config.hidden_size == 32


def test_exports_that_were_killed_leave_nothing(values):
    go(values)
    run = Path(values["output"])
    (run / "export").rename(run / ".export.123.old")
    (run / ".best.123.tmp").mkdir()
    with pytest.raises(UserError, match="finished"):
        go(values)
    assert (run / "export" / "model.safetensors").exists()
    assert {p.name for p in run.iterdir() if p.name.startswith(".")} == {".lock"}


def goes_on_behind_its_best(run, values):
    """killed after the best evaluation and before the checkpoint that would have known of it, and evaluated at other
    steps from then on: the weights are still those of the step that they are said to be of"""
    shutil.copytree(values["output"], run)
    for name in ("export", "checkpoints/6"):
        shutil.rmtree(run / name)
    told = json.loads((run / "best" / "kdjax.json").read_text())
    told |= {"step": 5, "values": told["values"] | {"ce": 0.5 * told["values"]["ce"]}}
    (run / "best" / "kdjax.json").write_text(json.dumps(told))
    result = go(values, output=str(run), train=values["train"] | {"eval_every": 6})
    assert result.kept_step == 5 and result.evaluations[5] == told["values"]
    exported, best = load_model(result.export), load_model(run / "best")
    assert np.array_equal(np.asarray(exported.embed.weight[...]), np.asarray(best.embed.weight[...]))


def test_the_command_exports_the_best_weights_where_the_best_are_kept(values, run_values, root, tmp_path):
    test_rows = [{"path": str(root / "examples" / "data" / "gsm8k_test.jsonl"), "format": "prompt_response",
                  "prompt_key": "question", "response_key": "answer"}]  # fmt: skip
    values["data"]["eval"] = test_rows
    # A rate that is far too high: the best evaluation is not the last.
    values["train"] |= {"keep_best": True, "eval_every": 1, "eval_rows": 8, "learning_rate": 0.3, "warmup_ratio": 0.9}
    result = go(values)
    assert result.kept_step < result.steps
    kept, made = load_model(result.export), load_model(export(values["output"], tmp_path / "best"))
    goes_on_behind_its_best(tmp_path / "cut", values)
    assert np.array_equal(np.asarray(kept.embed.weight[...]), np.asarray(made.embed.weight[...]))
    values["train"]["keep_best"] = False
    values["output"] = str(tmp_path / "last")
    last, newest = load_model(go(values).export), load_model(export(values["output"], tmp_path / "newest"))
    assert np.array_equal(np.asarray(last.embed.weight[...]), np.asarray(newest.embed.weight[...]))
    assert not np.array_equal(np.asarray(last.embed.weight[...]), np.asarray(kept.embed.weight[...]))
