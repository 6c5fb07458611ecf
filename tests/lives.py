"""``python lives.py RUN.yaml KILLS SEED``: runs that are killed at random moments and started again, until one ends.

Everything is imported once and each life is a fork of that, so a life costs its training alone. Lives end in turn while
a checkpoint is being written, in start-up, and in training; the last of more than three while the student is exported.
Prints one JSON object: exit codes, and what each kill struck.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import yaml

import kdjax.models.hf
import kdjax.training.loop  # noqa: F401
from kdjax.train import main


def live(file: str) -> int:
    child = os.fork()
    if child == 0:
        log = os.open(str(Path(file).with_suffix(".log")), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        code = main(["--config", file])
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return child


def ended(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return None if pid == 0 else os.waitstatus_to_exitcode(status)


def strike(child: int, output: Path, moment: str, chance: random.Random) -> tuple[int, str]:
    """kill ``child`` at a ``moment``; returns its exit code, and what it was doing then"""
    began = time.monotonic()
    known = {path.name for path in output.glob("checkpoints/*")}
    after = {"save": (0, 0), "start-up": (0, 0.5), "training": (0.05, 0.6), "export": (0, 0)}[moment]
    at = began + chance.uniform(*after) if moment == "start-up" else None
    while (code := ended(child)) is None:
        fresh = {path.name for path in output.glob("checkpoints/*")} - known
        if at is None and (any(output.glob(".export*")) if moment == "export" else fresh):
            at = time.monotonic() + chance.uniform(*after)
        if at is not None and time.monotonic() >= at:
            saves = any("tmp" in path.name for path in output.glob("checkpoints/*"))
            exports = any(output.glob(".export*"))
            os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if moment == "start-up":  # what an earlier life left half-written may lie there still
                return code, "training" if fresh else moment
            return code, "export" if exports else "save" if saves else "training"
        time.sleep(0.0005)
    return code, "nothing"


def main_loop(file: str, kills: int, chance: random.Random) -> dict:
    output = Path(yaml.safe_load(Path(file).read_text())["output"])
    codes, struck = [], []
    for life in range(kills):
        moment = "export" if life == kills - 1 > 2 else ("save", "start-up", "training")[life % 3]
        code, what = strike(live(file), output, moment, chance)
        codes.append(code)
        struck.append(what)
        if code != -signal.SIGKILL:
            return {"codes": codes, "struck": struck}
    child = live(file)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return {"codes": codes, "struck": struck}


if __name__ == "__main__":
    print(json.dumps(main_loop(sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3])))))
