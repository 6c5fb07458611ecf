"""Teacher and student at the same time, on a core each: seconds of a step against the slower of the two alone.

    python -m benchmarks.overlap                     # ten minutes, two cores

The quickstart's student and teacher, the trainer held to one core and everything of the engine to another, in three
kinds of runs. Each side alone: the teacher's prefills one behind the other, and the compiled step on batches that are
ready, without reading or packing. In turns (``teacher.lookahead=0``), and overlapped (``teacher.lookahead=1``), both
with all that training does. The kinds alternate, and which comes first. Perfect overlap would take
max(teacher, student) a step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import quickstart
from benchmarks.record import ROOT, record, spread
from benchmarks.timing import ROUNDS, quotient
from kdjax.config import load_config
from kdjax.training.metrics import read_metrics

RESULT = ROOT / "benchmarks" / "results" / "overlap.json"
OUT = ROOT / "runs" / "benchmark" / "overlap"
TRAINER, ENGINE = 0, 1  # cores
STEPS, WINDOW, WARM = 60, 5, 3  # steps of a run and of a line of metrics; lines that still compile
LOOK_SECONDS = 0.2
OVERRIDES = (
    "overwrite=true",  # each round anew
    "teacher.threads=1",
    "teacher.batches_per_call=1",
    "train.batch_size=4",
    "train.eval_every=null",
    "train.eval_rows=4",
    "log.tensorboard=false",
    "log.sample_prompt=null",
    f"log.every={WINDOW}",
)


def run(lookahead: int, steps: int, *more: str) -> float:
    """Median seconds a step of a pinned run."""
    out = OUT / f"lookahead-{lookahead}"
    command = ["kdjax.train", "--config", str(quickstart.CONFIG), f"output={out}"]
    pinned([*command, *quickstart.overrides(0, steps, *OVERRIDES, f"teacher.lookahead={lookahead}", *more)])
    windows = [r for r in read_metrics(out / "metrics.jsonl") if "seconds/step" in r][WARM:]
    return median(w["seconds/step"] for w in windows)


def alone(steps: int, *more: str) -> dict[str, float]:
    """Median seconds of a prefill and of a step, each while the other side has nothing to do, pinned likewise."""
    OUT.mkdir(parents=True, exist_ok=True)
    out = OUT / "alone.json"
    overrides = quickstart.overrides(0, steps, *OVERRIDES, f"output={OUT / 'alone'}", *more)
    pinned(["benchmarks.overlap_side", str(quickstart.CONFIG), str(out), *overrides])
    return {side: median(seconds) for side, seconds in json.loads(out.read_text()).items()}


def pinned(command: list[str]) -> None:
    """Run a Python module with its threads on one core and those of the engine that it starts on the other."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {TRAINER})  # children begin where their parent is
    try:
        trainer = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    finally:
        os.sched_setaffinity(0, cores)
    moved = 0
    while trainer.poll() is None:
        moved = sum(hold(session, ENGINE) for session in sessions_of(trainer.pid))
        time.sleep(LOOK_SECONDS)
    if trainer.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit status {trainer.returncode}")
    if moved:
        raise RuntimeError("threads of the engine were still found on the trainer's core at the end")


def sessions_of(trainer: int) -> list[int]:
    """Sessions led by a child of the trainer: engines."""
    found = []
    for path in Path(f"/proc/{trainer}/task").glob("*/children"):
        try:
            found += [child for child in map(int, path.read_text().split()) if os.getsid(child) == child]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while it was looked at
    return found


def hold(session: int, core: int) -> int:
    """Put every thread of a session on one core; returns how many were elsewhere."""
    moved = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) != session:
                continue
            for thread in (folder / "task").iterdir():
                if os.sched_getaffinity(int(thread.name)) != {core}:
                    os.sched_setaffinity(int(thread.name), {core})
                    moved += 1
        except (FileNotFoundError, ProcessLookupError):
            continue
    return moved


def measure(rounds: int = ROUNDS, steps: int = STEPS, *more: str) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"turns": [], "teacher": [], "student": [], "overlapped": []}
    kinds: dict[str, Callable[[], dict[str, float]]] = {
        "alone": lambda: alone(steps, *more),
        "turns": lambda: {"turns": run(0, steps, *more)},
        "overlapped": lambda: {"overlapped": run(1, steps, *more)},
    }
    for number in range(rounds):
        # A machine that grows slower or faster favours none.
        for kind in list(kinds.values())[:: 1 if number % 2 == 0 else -1]:
            for name, each in kind().items():
                seconds[name].append(each)
        print(f"{number}: " + ", ".join(f"{name} {each[-1]:.3f} s" for name, each in seconds.items()), flush=True)
    config = load_config(quickstart.CONFIG, [f"output={OUT}", *quickstart.overrides(0, steps, *OVERRIDES, *more)])
    longer = [max(pair) for pair in zip(seconds["teacher"], seconds["student"], strict=True)]
    return {
        "shapes": {
            "steps": steps,
            "not_counted": WINDOW * WARM,
            "rows": config.train.batch_size,
            "length": config.data.max_len,
            "dtypes": {"student": config.student.dtype, "teacher": config.teacher.dtype},
        },
        "overrides": [*more],
        "seconds": {name: spread(each) for name, each in seconds.items()},
        "against_the_slower_alone": quotient(seconds["overlapped"], longer),
        "against_turns": quotient(seconds["overlapped"], seconds["turns"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="further keys of the configuration, as in teacher.dtype=float32")
    given = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("this needs two cores, and the process may use one only")
    found = record(given.out, measure(given.rounds, given.steps, *given.overrides))
    for name in ("against_the_slower_alone", "against_turns"):
        print(f"{name.replace('_', ' ')}: {found[name]['ratio']:.3f} ± {found[name]['spread']:.0%}")


if __name__ == "__main__":
    main()
