"""``python lives.py RUN.yaml KILLS SEED``: runs that are killed at random moments and started again, until one ends.

Everything is imported once and each life is a fork of that, so a life costs its training alone. Every other life is
killed while a checkpoint is being written. Prints one JSON object: exit codes, and how many kills struck a save.
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


def main_loop(file: str, kills: int, chance: random.Random) -> dict:
    output = Path(yaml.safe_load(Path(file).read_text())["output"])
    codes, saving = [], 0
    for life in range(kills):
        child = live(file)
        known = {path.name for path in output.glob("checkpoints/*")}
        strikes_a_save = life % 2 == 0
        begun = None
        while (code := ended(child)) is None:
            fresh = [p.name for p in output.glob("checkpoints/*") if p.name not in known]
            if fresh and begun is None:
                begun = time.monotonic() + (chance.uniform(0, 0.02) if strikes_a_save else chance.uniform(0.05, 0.6))
            if begun is not None and time.monotonic() >= begun:
                saving += any("tmp" in p.name for p in output.glob("checkpoints/*"))
                os.kill(child, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                break
            time.sleep(0.0005)
        codes.append(code)
        if code != -signal.SIGKILL:
            return {"codes": codes, "saving": saving}
    child = live(file)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return {"codes": codes, "saving": saving}


if __name__ == "__main__":
    print(json.dumps(main_loop(sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3])))))
