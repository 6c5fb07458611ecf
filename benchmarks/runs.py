"""Runs of ``kdjax.train`` that a benchmark needs: each made once, and again only when its configuration has changed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, commit
from kdjax.config import Config, load_config, to_dict
from kdjax.errors import UserError

COMMIT = "commit"  # of a run's folder: the file that says which one made it
WEIGHTS = "weights"  # the same: a digest of the weights that it began with or learnt from
UNREAD = ("output", "overwrite", "generate")


def trained(out: Path, config: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of a run in ``out``: what stands there if the same was asked for; an interrupted one goes on."""
    asked = [f"output={out}", *overrides]
    same = is_run_of(out, config, asked)
    if not (same and (out / "result.json").exists()):
        fresh = [] if same else ["overwrite=true"]
        read = weights(load_config(config, asked))
        command = [sys.executable, "-m", "kdjax.train", "--config", str(config), *asked, *fresh]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (out / COMMIT).write_text(commit())
        (out / WEIGHTS).write_text(read)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def is_run_of(out: Path, config: Path, asked: list[str]) -> bool:
    """Whether what stands in a run's folder, finished or not, was made by the configuration that is asked for now, and
    by a finished one of the same weights: a folder's name stays when another teacher is put there.

    A key that is younger than the run counts with its default; of what a run without rollouts never reads, none does.
    """
    try:
        saved, now = load_config(out / "config.yaml"), load_config(config, asked)
    except UserError:  # nothing there, or a configuration of another version
        return False
    noted = out / WEIGHTS
    if noted.exists() and noted.read_text() != weights(now):
        return False
    unread = UNREAD if now.distill.on_policy_fraction else (*UNREAD, "rollout")
    return all(getattr(saved, name) == getattr(now, name) for name in to_dict(now) if name not in unread)


def weights(config: Config) -> str:
    """A digest of the weights in local folders that a run begins with or learns from."""
    began = [] if config.student.init == "random" else [config.student.path]
    folders = [ROOT / path for path in (*began, config.teacher.path) if path is not None]
    files = sorted(file for folder in folders for file in folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8] if files else "none"


def digest(config: Path, *overrides: str) -> str:
    """A short name for what a run computes, for the folder that other runs start from."""
    values = to_dict(load_config(config, overrides))
    read = {name: values[name] for name in sorted(values.keys() - set(UNREAD))}
    return hashlib.sha256(json.dumps(read, default=str).encode()).hexdigest()[:8]


def made_at(folders: Iterable[Path]) -> str:
    """The commits that the runs in ``folders`` were made at; "unknown" stands for runs that do not say."""
    notes = [folder / COMMIT for folder in folders if (folder / "result.json").exists()]
    return ", ".join(sorted({note.read_text() if note.exists() else "unknown" for note in notes}))
