"""The engine's side of ``benchmarks.pool``: a process with torch and without jax that writes into a pool as engines do.

python -m benchmarks.pool_side SPEC: a PoolSpec as JSON; then a request a line in JSON, each answered by a line.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable

import torch

from bridge.cuda import gpus
from bridge.hidden_pool import PoolSpec
from bridge.pool_rows import PoolRows


def checksum(rows: torch.Tensor) -> int:
    """Of every bit and its place: sum of 16-bit words, each times its place modulo 65,521, plus 1; modulo 2³²."""
    words = rows.contiguous().view(torch.int16).flatten().to(torch.int64) & 0xFFFF
    places = torch.arange(len(words), device=rows.device) % 65521 + 1
    return int((words * places).sum()) % 2**32


class Side:
    def __init__(self, spec: PoolSpec) -> None:
        self._rows = PoolRows(spec, ranks=[gpus()[0] if spec.blocks else ""])
        self._width, self._device = spec.width, "cuda" if spec.blocks else "cpu"

    def fill(self, number: int, canary: float, runs: list[tuple[int, int]]) -> list[int]:
        """Random rows in pieces, in any order, between two rows of ``canary``; returns each run's checksum."""
        generator, order = torch.Generator().manual_seed(number), random.Random(number)
        sums = []
        for start, count in runs:
            guard = torch.full((1, self._width), canary, device=self._device)
            rows = torch.randn(count - 2, self._width, generator=generator).to(self._device, self._rows.dtype)
            pieces, at = [(start, guard), (start + count - 1, guard)], 0
            for piece in rows.split(order.randint(1, count)):
                pieces.append((start + 1 + at, piece))
                at += len(piece)
            order.shuffle(pieces)
            for row, piece in pieces:
                self._rows.write(row, piece.to(self._rows.dtype))
            sums.append(checksum(rows))
        self._rows.finish()
        return sums

    def speed(self, row: int, count: int, calls: int, rounds: int) -> dict[str, list[float]]:
        """Seconds of a write into the pool and of a plain copy of as many bytes, in turn, each the mean of some."""
        source = torch.ones(count, self._width, device=self._device, dtype=self._rows.dtype)
        other = torch.empty_like(source)

        def seconds(write: Callable[[], object]) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                write()
            self._rows.finish()
            self._wait()
            return (time.perf_counter() - start) / calls

        ways = {"pool": lambda: self._rows.write(row, source), "copy": lambda: other.copy_(source)}
        for write in ways.values():
            seconds(write)
        each: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, write in ways.items():
                each[name].append(seconds(write))
        return each

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    side = Side(PoolSpec.of(json.loads(sys.argv[1])))
    for line in sys.stdin:
        what, arguments = json.loads(line)
        print(json.dumps(getattr(side, what)(**arguments)), flush=True)


if __name__ == "__main__":
    main()
