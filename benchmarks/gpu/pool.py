"""Hidden rows from another process by CUDA IPC: every number of 1,000 batches checked, and the speed of a plain copy.

See ``benchmarks.pool``, which the CPU's tests run too. The writer and the reader are two processes on one GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from benchmarks.pool import speed, under_fire
from benchmarks.record import spread
from benchmarks.timing import ROUNDS, quotient
from bridge.hidden_pool import HiddenPool


def measure(case: None, toy: bool, folder: Path) -> dict[str, Any]:
    on = [[0]] if jax.default_backend() == "gpu" else ()
    rows, width, batches = (400, 40, 50) if toy else (4096, 1024, 1000)
    with HiddenPool.create(rows=rows, width=width, dtype="bfloat16", on=on) as hidden:
        fire = under_fire(hidden, batches, most=rows // 7)
    if fire["wrong"]:
        raise RuntimeError(f"rows that came through the pool are wrong: {fire}")
    rows, width, calls = (512, 64, 2) if toy else (32_768, 4096, 20)
    with HiddenPool.create(rows=rows, width=width, dtype="bfloat16", on=on) as hidden:
        found = speed(hidden, rows, calls, ROUNDS)
    size = found["bytes"]
    ways = {name: spread(found[name]) for name in ("pool", "copy")}
    return {
        "fire": fire,
        "bandwidth": {
            "bytes": size,
            # A copy reads and writes.
            **{name: way | {"bytes_per_second": 2 * size / way["seconds"]} for name, way in ways.items()},
            "share_of_plain_copy": quotient(found["copy"], found["pool"]),
        },
    }
