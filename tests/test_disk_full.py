"""Disks that run full: what was saved before survives, and the message says what was needed and what is free."""

import errno
import gc
import os
import re
import resource
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_tools import go, losses, without_teacher, write_config

from kdjax import disk
from kdjax.command import guarded
from kdjax.errors import UserError
from kdjax.models import load_model
from kdjax.train import main
from kdjax.training import checkpoint
from kdjax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("devices_as_asked")


@pytest.fixture(autouse=True)
def nothing_left_to_collect():
    """Failed writes stay behind in cycles, and asyncio formats their tracebacks when they are collected, wherever that
    happens to be; inside another test's ``ast.parse``, Python 3.11 takes that for a fault of its own (gh-106905)."""
    yield
    gc.collect()


@pytest.fixture
def values(run_values):
    run_values["data"]["eval"] = []
    run_values["train"] = {"steps": 4, "batch_size": 4, "learning_rate": 3e-3}
    run_values["checkpoint"] |= {"save_every": 2, "keep": 1}
    return without_teacher(run_values)


@contextmanager
def full_after(looks):
    """the disk is found full from the n-th look on"""
    seen = []

    def usage(path):
        seen.append(path)
        return SimpleNamespace(free=10**12 if len(seen) <= looks else 1000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk.shutil, "disk_usage", usage)
        yield


def goes_on(values):
    result = go(values)
    assert result.steps == 4 and len(losses(values["output"])) == 4
    load_model(result.export)


def test_a_full_disk_is_known_before_a_checkpoint_is_begun(values):
    message = r"checkpoint of step 4: it needs \d\.\d MB, .* has 0.0 MB free; the last good .* of step 2"
    with full_after(1), pytest.raises(UserError, match=message):
        go(values)
    assert [p.name for p in (Path(values["output"]) / "checkpoints").iterdir()] == ["2"]
    goes_on(values)


def test_a_full_disk_is_known_before_an_export_is_begun(values):
    with full_after(2), pytest.raises(UserError, match=r"export: .*/export needs \d\.\d MB, the disk has 0.0 MB free"):
        go(values)
    assert [p.name for p in (Path(values["output"]) / "checkpoints").iterdir()] == ["4"]
    goes_on(values)


def test_a_write_that_fails_half_way_is_one_line_and_leaves_the_earlier_checkpoint(values, tmp_path, capfd):
    """no file may grow beyond 100 KB from the second save on: what a full disk does in the middle, without root"""
    save, before = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, step, *rest):
        if step == 4:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        save(self, step, *rest)

    file = write_config(tmp_path, values)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", limited)
            assert main(["--config", str(file)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capfd.readouterr().err
    assert re.fullmatch(
        r"error: checkpoint of step 4: File too large: it needs .* MB, .* the last good .* of step 2; .*\n", error
    )
    assert [p.name for p in (Path(values["output"]) / "checkpoints").iterdir()] == ["2"]
    goes_on(values)


@pytest.fixture
def small_disk(tmp_path):
    """a file system of 3 MB"""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk(values, small_disk, monkeypatch):
    """checked sizes are no promise: something else fills the disk after the check"""
    values["output"] = str(small_disk / "run")
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path, real=disk.free_bytes: max(real(path), 10**9))
    values["checkpoint"]["keep"] = 9
    values["train"] |= {"steps": 40}
    with pytest.raises(
        UserError,
        match="checkpoint of step .*: No space left on device: it needs .* MB, .* free; the last good checkpoint",
    ):
        go(values)
    whole = sorted(int(p.name) for p in (small_disk / "run" / "checkpoints").iterdir())
    values["checkpoint"]["keep"] = 1
    values["output"] = str(small_disk.parent / "elsewhere")
    subprocess.run(["cp", "-r", small_disk / "run", values["output"]], check=True)
    assert whole and go(values).steps == 40


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    """whatever stops the writing, and with what a kill left of an earlier attempt in the way"""
    file = tmp_path / "report.json"
    disk.write_whole(file, "old")
    (tmp_path / ".report.json.tmp").write_text("what a killed process left, longer than anything else")
    with pytest.raises(KeyboardInterrupt), disk.whole(file) as writing:
        writing.write("half")
        raise KeyboardInterrupt
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"report.json": "old"}
    with disk.whole(file, durable=True) as writing:
        writing.write("new")
        writing.flush()
        assert file.read_text() == "old"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"report.json": "new"}


def test_any_other_full_disk_is_one_line(capsys):
    def command():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/metrics.jsonl")

    assert guarded(command) == 2
    assert capsys.readouterr().err == "error: /runs/metrics.jsonl: No space left on device; free space and try again\n"
