"""The folder of a run: what the run wrote is replaced, or given back; what others wrote there is left alone."""

import re
from pathlib import Path

import pytest
from run_tools import contents

from bridge.errors import EngineError
from kdjax.config import from_dict, to_yaml
from kdjax.config.identity import FREE
from kdjax.errors import UserError
from kdjax.training.folder import WRITTEN, RunFolder

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "concepts.md").read_text()
OWN = {
    "generated.jsonl": "hours of a teacher",
    "generated.journal.jsonl": "the same",
    "answers/exact-export.jsonl": "1",
}


def config(output, **changes):
    values = {"output": str(output), "student": {"path": "s"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    return from_dict(values | changes)


@pytest.fixture
def run(tmp_path):
    """a folder with a finished run, and with what other commands write there by default"""
    folder = tmp_path / "run"
    of_the_run = {"config.yaml": to_yaml(config(folder)), "result.json": "{}", "metrics.jsonl": "", "run.json": "{}"}
    of_the_run |= {
        "checkpoints/4/x": "1",
        "export/config.json": "{}",
        "rollouts/step_000001.jsonl": "",
        "student0.log": "",
    }
    for name, text in (of_the_run | OWN).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_overwriting_leaves_what_no_run_wrote(run):
    with RunFolder(config(run, overwrite=True)) as folder:
        assert {name: (run / name).read_text() for name in OWN} == OWN  # while the new run reads its data
        folder.keep()
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files == {*OWN, ".lock", "config.yaml"}


def test_a_failed_start_gives_everything_back(run):
    before = contents(run)
    with pytest.raises(UserError), RunFolder(config(run, overwrite=True)):
        for name in ("engine.log", "checkpoints/x", "student1.log"):
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_text("of the new run")
        (run / "generated.report.json").write_text("by somebody else, meanwhile")
        raise UserError("a fault in the data")
    after = contents(run)
    assert after.pop("generated.report.json") == b"by somebody else, meanwhile"
    assert after == before


def test_the_logs_that_an_engines_error_names_stay(tmp_path):
    logs = {"engine.log", "student0.log"}
    with pytest.raises(EngineError), RunFolder(config(tmp_path / "new")):
        for name in (*logs, "metrics.jsonl"):
            (tmp_path / "new" / name).write_text("died")
        raise EngineError("last lines of student0.log")
    assert {path.name for path in (tmp_path / "new").iterdir()} == logs


def test_what_a_killed_run_left_goes_and_what_is_not_its_own_stays(run):
    """another command is writing its answers meanwhile, and a person has hidden folders"""
    others = (".generated.jsonl.tmp", ".data.old/rows.jsonl", ".notes.old/a.txt", ".answers.17.tmp/a.jsonl", "data/x")
    for name in (*others, ".export.17.tmp/config.json", ".best.17.old/config.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("1")
    with RunFolder(config(run, overwrite=True)) as folder:
        folder.keep()
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files == {*OWN, *others, ".lock", "config.yaml"}


def table(heading):
    """the first two cells of each row of the table behind a line of docs/concepts.md"""
    rows = PAGE.partition(heading)[2].lstrip("\n").partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")][:2] for row in rows if row.startswith("|")]


def test_the_page_lists_all_that_a_run_writes():
    told = [name.rstrip("/") for cell, _ in table("## What a run writes\n") for name in re.findall(r"`([^`]+)`", cell)]
    patterns = {name.replace("[0-9]*", "0") for name in WRITTEN}
    assert set(told) - {"output"} == patterns


def test_the_page_lists_all_that_may_change():
    told = set()
    for group, keys in table("must be as it was, but for these:\n"):
        prefix = f"{group.strip('`')}." if group.startswith("`") else ""
        told |= {prefix + key for key in re.findall(r"`([^`]+)`", keys)}
    assert told == FREE
