"""A pool under fire: two processes, leases of random sizes that are reused at once, every number checked on both sides.

An engine's process writes random rows, in pieces and in any order, between rows that hold a canary, and sums what it
wrote. The trainer's process views them without a copy and sums what it sees: when the rows are said to be there, and
again just before they go back, after others were written all around. The CPU's tests and ``make gpu`` run the same.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from queue import Empty, Queue
from typing import Any

import jax
import numpy as np

from benchmarks.record import ROOT
from bridge.hidden_pool import HiddenPool, Lease

AHEAD, HELD, SECONDS = 4, 8, 60  # batches that the engine may be ahead, that the trainer may hold; patience
FAULTS = ("changed", "canaries", "unwritten", "copied")


class Writer:
    """The engine's process. A context manager."""

    def __init__(self, pool: HiddenPool) -> None:
        command = [sys.executable, "-m", "benchmarks.pool_side", json.dumps(asdict(pool.spec))]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._process = subprocess.Popen(command, cwd=ROOT, **pipes)

    def ask(self, what: str, **arguments: Any) -> None:
        self._process.stdin.write(json.dumps([what, arguments]) + "\n")

    def answer(self) -> Any:
        """To the oldest question; raises RuntimeError where the process has died."""
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the writer died with exit status {self._process.wait(SECONDS)}")
        return json.loads(line)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Written:
    """A leased batch: ``number`` names it, ``sums`` are the writer's checksums of its runs."""

    number: int
    lease: Lease
    sums: tuple[int, ...] = ()


def canary(number: int) -> int:
    """What a batch's guard rows hold; bfloat16 holds it exactly."""
    return 1 + number % 251


def checksum(rows: np.ndarray) -> int:
    """As ``benchmarks.pool_side`` has it."""
    words = rows.view(np.uint16).ravel().astype(np.uint64)
    return int((words * (np.arange(len(words), dtype=np.uint64) % 65521 + 1)).sum()) % 2**32


def faults(rows: np.ndarray, number: int, expected: int) -> Counter[str]:
    """What is wrong with the rows of a run, guard rows included."""
    guards = (rows[[0, -1]].astype(np.float32) != canary(number)).any()
    return Counter(changed=int(checksum(rows[1:-1]) != expected), canaries=int(guards))


def under_fire(pool: HiddenPool, batches: int, most: int, seed: int = 0) -> dict[str, Any]:
    """Send ``batches`` leases of one to three runs, of 3 to ``most`` rows each, through the pool; counts what is wrong.

    Returns ``wrong``, the sum of what each of FAULTS counts (runs; unwritten counts rows), and how hard it was:
    ``runs``, ``bytes``, ``seconds``, the ``fullest`` that the pool was, and the seconds that leases ``waited``.
    """
    rng = random.Random(seed)
    asked: Queue[Written | None] = Queue(AHEAD)
    held: deque[Written] = deque()
    found: Counter[str] = Counter()

    def produce() -> None:
        try:
            for number in range(batches):
                lease = pool.lease([rng.randint(3, most) for _ in range(rng.randint(1, 3))], timeout=SECONDS)
                pool.expect(_runs(lease))
                writer.ask("fill", number=number, canary=canary(number), runs=_runs(lease))
                asked.put(Written(number, lease), timeout=SECONDS)
        finally:
            asked.put(None, timeout=SECONDS)

    def look(batch: Written) -> None:
        for shard, expected in enumerate(batch.sums):
            view = batch.lease.view(shard)
            array = jax.dlpack.from_dlpack(view, copy=False)
            found["copied"] += array.unsafe_buffer_pointer() != view.address
            found.update(faults(np.asarray(array), batch.number, expected))

    def let_go() -> None:
        batch = held.popleft()
        look(batch)
        batch.lease.release()

    start, depth = time.perf_counter(), random.Random(seed + 1)
    with Writer(pool) as writer, ThreadPoolExecutor(1) as threads:
        producer = threads.submit(produce)
        while (batch := _next(asked, held, let_go)) is not None:
            batch.sums = tuple(writer.answer())
            found["unwritten"] += sum(pool.missing(_runs(batch.lease)))
            look(batch)
            held.append(batch)
            found["runs"] += len(batch.sums)
            found["bytes"] += sum(batch.lease.counts) * pool.spec.row_bytes
            while len(held) > depth.randint(1, HELD):  # they lie among what is written meanwhile
                let_go()
        while held:
            let_go()
        producer.result()
    usage = pool.usage()
    return {
        "batches": batches,
        "wrong": sum(found[fault] for fault in FAULTS),
        **{name: found[name] for name in (*FAULTS, "runs", "bytes")},
        "seconds": time.perf_counter() - start,
        "fullest": usage.peak / usage.rows,
        "waited": usage.waited,
    }


def _next(asked: Queue[Written | None], held: deque[Written], let_go: Callable[[], None]) -> Written | None:
    """The next batch; while there is none, rows that are held go back, as the pool may be too full for another."""
    while True:
        try:
            return asked.get(block=not held, timeout=SECONDS)
        except Empty:
            if not held:
                raise
            let_go()


def _runs(lease: Lease) -> list[tuple[int, int]]:
    return list(zip(lease.starts, lease.counts, strict=True))


def speed(pool: HiddenPool, rows: int, calls: int, rounds: int) -> dict[str, Any]:
    """Seconds of a write of so many rows into the pool and of a plain copy, round by round, and its ``bytes``."""
    with Writer(pool) as writer, pool.lease([rows], timeout=SECONDS) as lease:
        writer.ask("speed", row=lease.starts[0], count=rows, calls=calls, rounds=rounds)
        return {"bytes": rows * pool.spec.row_bytes, **writer.answer()}
