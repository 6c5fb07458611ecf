"""Answers from real engines: the shipped arithmetic teacher writes rows and is scored, and a killed process goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from data_tools import ROOT

import kdjax.evaluate
import kdjax.generate

ARITHMETIC = ROOT / "examples" / "arithmetic"


@pytest.fixture
def configured(tmp_path):
    """A configuration file with ``values`` in it; rows are the held-out sums."""

    def write(engine, rows, **generate):
        values = {
            "output": str(tmp_path / engine),
            "teacher": {"path": str(ARITHMETIC / "teacher"), "engine": engine, "threads": 1},
            "data": {key: [{"path": str(ARITHMETIC / "eval.jsonl"), "max_samples": rows}] for key in ("train", "eval")},
            "generate": {"max_new_tokens": 96, "temperature": 0.0, "batch_size": 12} | generate,
        }
        file = tmp_path / f"{engine}.yaml"
        file.write_text(yaml.safe_dump(values))
        return str(file)

    return write


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sglang_writes_a_data_set_and_transformers_says_the_same(configured, tmp_path, capsys):
    assert kdjax.generate.main(["--config", configured("sglang", 40, judge="gsm8k")]) == 0
    shown = capsys.readouterr().out
    assert "40/40 prompts" in shown and "tok/s" in shown and "answers to 40 prompts kept" in shown
    rows = written(tmp_path / "sglang" / "generated.jsonl")
    assert len(rows) >= 36  # the teacher is right nine times in ten at least
    assert all(row["reward"] == 1.0 and row["finish_reason"] == "stop" for row in rows)
    file = configured("transformers", 8)
    arguments = ["--config", file, "--model", str(ARITHMETIC / "teacher"), "--task", "gsm8k"]
    assert kdjax.evaluate.main(arguments) == 0
    found = json.loads("{" + capsys.readouterr().out.partition("{")[2])
    scored = written(tmp_path / "transformers" / "answers" / "gsm8k-teacher.jsonl")
    assert found["prompts"] == len(scored) == 8 and found["unfinished"] == 0
    assert found["accuracy"] == sum(row["reward"] for row in scored) / 8
    theirs = {row["source"]: row["messages"][-1]["content"] for row in rows}
    assert all(theirs.get(row["source"], row["response"]) == row["response"] for row in scored)
    assert [row["source"] in theirs for row in scored] == [row["reward"] == 1.0 for row in scored]


@pytest.mark.full
def test_a_killed_process_goes_on(configured, tmp_path):
    file = configured("transformers", 24, samples=2, temperature=1.0, batch_size=2)
    assert kdjax.generate.main(["--config", file, f"generate.out={tmp_path}/whole.jsonl"]) == 0
    command = [sys.executable, "-m", "kdjax.generate", "--config", file, f"generate.out={tmp_path}/cut.jsonl"]
    journal = tmp_path / "cut.journal.jsonl"
    for lines in (3, 7):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=dict(os.environ))
        end = time.monotonic() + 120
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut.jsonl").exists()
    assert kdjax.generate.main(command[3:]) == 0
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert journal.read_bytes() == (tmp_path / "whole.journal.jsonl").read_bytes()
