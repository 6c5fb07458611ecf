"""What the tests of whole runs share: starting one, what it wrote, what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from kdjax.config import from_dict
from kdjax.progress import Display
from kdjax.training.loop import Result, train

ROOT = Path(__file__).resolve().parent.parent
# One device and every compiled program from the cache: a life of a few seconds.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
}


class Watcher(Display):
    """A quiet display that keeps the lines and calls ``at[n]()`` when step n is done."""

    def __init__(self, at: dict[int, Callable[[], None]] | None = None) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self._at = at or {}

    def line(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, step: int, loss: float) -> None:
        if step in self._at:
            self._at.pop(step)()


def go(values: dict, display: Display | None = None, **changes) -> Result:
    return train(from_dict({**values, **changes}), display or Display(quiet=True))


def without_teacher(values: dict) -> dict:
    values["teacher"] = {}
    values["data"]["tokenizer"] = values["student"]["path"]
    return values


def losses(folder: Path | str, key: str = "loss") -> list[float]:
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def write_config(folder: Path, values: dict, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(values))
    return file


def start(*arguments: str, temporary: Path | None = None) -> subprocess.Popen:
    """``python -m kdjax.train`` in a process of its own, its temporary files in ``temporary``"""
    command = [sys.executable, "-m", "kdjax.train", *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | ({} if temporary is None else {"TMPDIR": str(temporary)})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    """every file below ``folder``, by its path; empty where there is no folder"""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"/" for p in sorted(folder.rglob("*"))}


def servers(of: int | None = None) -> list[int]:
    """engine servers that the process ``of`` (by default this one) started and that live"""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (process / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == (of or os.getpid()) and state != "Z" and b"bridge.server" in words:
            found.append(int(process.name))
    return sorted(found)


def traces(pid: int, temporary: Path) -> set[str]:
    """what process ``pid``, whose temporary files lie in ``temporary``, has left of pools, engines and their files"""
    files = [*Path("/dev/shm").glob(f"kdjax-*-{pid}-*"), *temporary.glob("kdjax-engine-*")]
    return {str(path) for path in files} | {f"process {one}" for one in {*servers(pid), *with_folder(temporary)}}


def with_folder(temporary: Path) -> list[int]:
    """live processes whose environment names ``temporary``: an engine's, however deep below its server"""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(temporary).encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found
