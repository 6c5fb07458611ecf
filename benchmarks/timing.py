"""Times programs in turn, so that the machine's moods meet all alike, and finds the memory that a program takes."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.record import spread

ROUNDS = 3
SECONDS = 0.7  # of calls in a round: over its rounds a program is timed for two seconds at least


def in_turns(
    programs: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS, seconds: float = SECONDS
) -> dict[str, dict[str, Any]]:
    """Seconds of a call of each program, as ``spread`` gives them, and how many ``calls`` were timed.

    In each round every program is called until ``seconds`` have passed, at least once; the median of these calls is
    the round's number. A program returns when its result is there, and was called before: nothing here warms up.
    """
    each: dict[str, list[float]] = {name: [] for name in programs}
    calls = dict.fromkeys(programs, 0)
    for _ in range(rounds):
        for name, run in programs.items():
            took, begin = [], time.perf_counter()
            while not took or time.perf_counter() - begin < seconds:
                start = time.perf_counter()
                run()
                took.append(time.perf_counter() - start)
            each[name].append(median(took))
            calls[name] += len(took)
    return {name: spread(numbers) | {"calls": calls[name]} for name, numbers in each.items()}


def quotient(above: list[float], below: list[float]) -> dict[str, Any]:
    """Median, every repetition and spread of a ratio whose two sides were measured round by round, in turn."""
    found = spread([a / b for a, b in zip(above, below, strict=True)])
    return {"ratio": found.pop("seconds"), **found}


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far the process's resident memory rose while ``run`` ran, above where it stood before (Linux).

    What was there before and is reused does not count, so memory that the allocator keeps is given back first.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts from here
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
