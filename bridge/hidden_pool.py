"""Hidden rows in shared memory: the trainer owns the pool and leases rows, engines write them, arrays view them.

On a CPU the pool is one file in /dev/shm: `rows` rows of `width` numbers, then one byte a row, its *stamp*, that an
engine sets when it has written the row. On GPUs the file holds the stamps alone, and the rows lie in plain allocations
that engines open by CUDA IPC: the pool has a *part* for each data shard, and a part has a copy, or several, on the GPUs
that train on that shard. Rows are numbered through all parts.

A lease is taken, the engine writes, JAX views the rows without a copy, the step that read them finishes, the lease goes
back. A pool that is full makes the producer wait, first come first served; a leased row is never given away.
"""

import math
import mmap
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bridge.cuda import Allocation, gpus
from bridge.dlpack import ALIGNMENT, CPU, CUDA, ITEM_BYTES, DLPackView
from bridge.errors import EngineError
from bridge.segments import create_segment, map_segment, removed_with, sweep


@dataclass(frozen=True)
class Block:
    """One part of a pool on one GPU: which part, the GPU's UUID, and the allocation's CUDA IPC handle."""

    part: int
    gpu: str
    handle: str
    """hexadecimal"""


@dataclass(frozen=True)
class PoolSpec:
    """Where a pool lies and what it holds: all that another process needs to map it. Without blocks: in the file."""

    path: str
    rows: int
    width: int
    dtype: str
    parts: int = 1
    blocks: tuple[Block, ...] = ()

    @property
    def row_bytes(self) -> int:
        return self.width * ITEM_BYTES[self.dtype]

    @property
    def part_rows(self) -> int:
        """rows of each part: part k has rows `k * part_rows` and following"""
        return self.rows // self.parts

    @property
    def copies(self) -> int:
        """on how many GPUs each part lies; every copy has stamps of its own"""
        return max(1, len(self.blocks) // self.parts)

    @property
    def stamps_at(self) -> int:
        """byte offset of the stamps in the file, uint8 [copies, rows]"""
        return 0 if self.blocks else self.rows * self.row_bytes

    @property
    def bytes(self) -> int:
        """size of the file"""
        return self.stamps_at + self.copies * self.rows

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "PoolSpec":
        """from the plain values that `dataclasses.asdict` makes of one"""
        return cls(**{**fields, "blocks": tuple(Block(**block) for block in fields["blocks"])})

    def map(self) -> mmap.mmap:
        """map the segment for reading and writing; it stays mapped for as long as anything refers to the result"""
        return map_segment(self.path, self.bytes)


@dataclass(frozen=True)
class PoolUsage:
    """used, free and peak count rows (padding for alignment included); waited is the seconds leases spent waiting"""

    rows: int
    used: int
    free: int
    peak: int
    leases: int
    waiting: int
    waited: float


class HiddenPool:
    """Rows in shared memory, owned by this process. Thread-safe. Make one with `create`."""

    def __init__(self, spec: PoolSpec, descriptor: int, allocations: tuple[Allocation, ...] = ()):
        self.spec = spec
        self._memory = spec.map()
        self._allocations = allocations
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data
        stamps = np.frombuffer(self._memory, np.uint8, spec.copies * spec.rows, spec.stamps_at)
        self._stamps = stamps.reshape(spec.copies, spec.rows)
        self._unit = _rows_per_unit(spec.row_bytes)
        # Free runs (start, length), ascending, never adjacent within a part and never over two parts.
        self._runs = [(part * spec.part_rows, spec.part_rows) for part in range(spec.parts)]
        self._leases: dict[int, Lease] = {}
        self._queue: deque[object] = deque()
        self._change = threading.Condition()
        self._peak, self._waited, self._serial = 0, 0.0, 0
        self._remove = removed_with(self, spec.path, descriptor)

    @classmethod
    def create(
        cls, *, rows: int, width: int, dtype: str, parts: int = 1, on: Sequence[Sequence[int]] = ()
    ) -> "HiddenPool":
        """a pool of `parts` parts, each of at least `rows` rows of `width` numbers of `dtype` ("float32", "bfloat16")

        on: for each part the numbers (as this process counts) of the GPUs that hold it; empty is host memory. Removes
        what dead owners left in /dev/shm first. Raises ValueError for a dtype or size that cannot be, and EngineError
        where the memory is not there.
        """
        if dtype not in ITEM_BYTES:
            raise ValueError(f"pool dtype {dtype!r}: one of {', '.join(ITEM_BYTES)} is needed")
        if min(rows, width, parts) < 1 or (on and (len(on) != parts or len({len(group) for group in on}) > 1)):
            raise ValueError(
                f"a pool needs rows and columns, and for each part equally many GPUs: {parts} parts of "
                f"{rows} x {width} on {[*on]}"
            )
        sweep()
        unit = _rows_per_unit(width * ITEM_BYTES[dtype])
        rows = math.ceil(rows / unit) * unit
        size = rows * width * ITEM_BYTES[dtype]
        places = [(part, gpu) for part, group in enumerate(on) for gpu in group]
        allocations = tuple(Allocation(gpu, size) for _, gpu in places)
        names = gpus() if on else []
        blocks = tuple(
            Block(part, names[gpu], allocation.handle().hex())
            for (part, gpu), allocation in zip(places, allocations, strict=True)
        )
        spec = PoolSpec("", parts * rows, width, dtype, parts, blocks)
        path, descriptor = create_segment("pool", spec.bytes, "hidden rows", "use fewer rows")
        return cls(replace(spec, path=path), descriptor, allocations)

    def lease(self, counts: Sequence[int], timeout: float | None = None) -> "Lease":
        """one contiguous run of rows for each count, each starting 64-byte aligned; waits until all are free

        With several parts the run of the first count lies in the first part, and so on. Waiting is first come, first
        served. Raises ValueError for a lease that no pool of this size can give, and EngineError after `timeout`
        seconds or when the pool is closed.
        """
        counts = tuple(counts)
        needs = [math.ceil(count / self._unit) * self._unit for count in counts]
        if self.spec.parts == 1:
            fits = sum(needs) <= self.spec.rows
        else:
            fits = len(needs) <= self.spec.parts and max(needs, default=0) <= self.spec.part_rows
        if not counts or min(counts) < 1 or not fits:
            raise ValueError(
                f"a lease of {counts} rows from a pool of {self.spec.parts} x {self.spec.part_rows}: each run needs "
                f"at least one row, and all of them, rounded up to {self._unit} rows, must fit; make the pool larger "
                f"or the batch smaller"
            )
        ticket, began = object(), time.monotonic()
        with self._change:
            self._queue.append(ticket)
            try:
                while self._remove.alive:
                    if self._queue[0] is ticket and (starts := self._take(needs)) is not None:
                        return self._granted(starts, counts, needs)
                    left = None if timeout is None else began + timeout - time.monotonic()
                    if left is not None and left <= 0:
                        raise EngineError(f"a lease of {sum(counts)} rows waited {timeout:g} s for {self._state()}")
                    self._change.wait(left)
                raise EngineError("the hidden pool was closed while a lease waited for rows")
            finally:
                self._queue.remove(ticket)
                self._waited += time.monotonic() - began
                self._change.notify_all()  # the next in line may fit now, or learn that the pool is closed

    def usage(self) -> PoolUsage:
        """how full the pool is, for metrics"""
        with self._change:
            free = sum(length for _, length in self._runs)
            used = self.spec.rows - free
            return PoolUsage(self.spec.rows, used, free, self._peak, len(self._leases), len(self._queue), self._waited)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """clear the stamps of rows (start, count) that an engine is about to write

        Raises ValueError unless every range lies inside one leased run and no two of them overlap.
        """
        with self._change:
            leased = sorted(
                (start, start + count)
                for lease in self._leases.values()
                for start, count in zip(lease.starts, lease.counts, strict=True)
            )
        edge, at = 0, 0
        for start, count in sorted(ranges):
            while at < len(leased) and leased[at][1] < start + count:
                at += 1
            if at == len(leased) or start < leased[at][0]:
                raise ValueError(f"rows {start} to {start + count - 1} are not leased as one run: lease them first")
            if start < edge:
                raise ValueError(f"two prompts would write row {start}")
            edge = start + count
        for start, count in ranges:
            self._stamps[:, start : start + count] = 0

    def missing(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """of each range (start, count), how many rows no engine has written since `expect`"""
        return [int(np.count_nonzero(~self._stamps[:, start : start + count].all(0))) for start, count in ranges]

    def close(self) -> None:
        """unlink the segment. Arrays that view it stay valid: the memory goes when the last of them does."""
        with self._change:
            self._remove()
            self._change.notify_all()

    def __enter__(self) -> "HiddenPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, needs: list[int]) -> list[int] | None:
        """cut a run of each length out of the free runs, first fit; None, and nothing changed, if one does not fit"""
        runs, starts = list(self._runs), []
        for number, need in enumerate(needs):
            part = number if self.spec.parts > 1 else 0
            for index, (start, length) in enumerate(runs):
                if length >= need and self._part(start) == part:
                    runs[index : index + 1] = [(start + need, length - need)] if length > need else []
                    starts.append(start)
                    break
            else:
                return None
        self._runs = runs
        return starts

    def _place(self, row: int, device: int) -> tuple[object, int, int]:
        """what holds a row on a device, the row's address, and DLPack's type of the device"""
        spec = self.spec
        if not spec.blocks:
            return self._memory, self._address + row * spec.row_bytes, CPU
        part = self._part(row)
        for block, allocation in zip(spec.blocks, self._allocations, strict=True):
            if block.part == part and allocation.ordinal == device:
                return allocation, allocation.address + (row - part * spec.part_rows) * spec.row_bytes, CUDA
        raise ValueError(f"row {row} lies in part {part} of the pool, which GPU {device} does not hold")

    def _part(self, row: int) -> int:
        return row // self.spec.part_rows

    def _granted(self, starts: list[int], counts: tuple[int, ...], needs: list[int]) -> "Lease":
        self._serial += 1
        lease = Lease(self, self._serial, tuple(starts), counts, tuple(needs))
        self._leases[self._serial] = lease
        self._peak = max(self._peak, self.spec.rows - sum(length for _, length in self._runs))
        return lease

    def _give_back(self, lease: "Lease") -> None:
        with self._change:
            if self._leases.pop(lease.serial, None) is None:
                raise ValueError(f"lease {lease.serial} was released twice")
            merged: list[tuple[int, int]] = []
            for start, length in sorted([*self._runs, *zip(lease.starts, lease.needs, strict=True)]):
                if merged and sum(merged[-1]) == start and start % self.spec.part_rows:
                    merged[-1] = (merged[-1][0], merged[-1][1] + length)
                else:
                    merged.append((start, length))
            self._runs = merged
            self._change.notify_all()

    def _state(self) -> str:
        free = sum(length for _, length in self._runs)
        longest = max((length for _, length in self._runs), default=0)
        return (
            f"the hidden pool: {free} of {self.spec.rows} rows are free (the longest run {longest}), "
            f"{len(self._leases)} leases hold the rest, {len(self._queue) - 1} others wait"
        )


@dataclass(frozen=True, eq=False)
class Lease:
    """Rows on loan, one run a data shard. starts: each run's first row; counts: its rows. Also a context manager."""

    pool: HiddenPool
    serial: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    needs: tuple[int, ...]

    def view(self, shard: int, shape: tuple[int, ...] | None = None, device: int = 0) -> DLPackView:
        """shard's rows [count, width] for `jax.dlpack.from_dlpack(view, copy=False)`, without a copy

        With `shape` the first rows of them as [*shape, width]. device: the number of the JAX device that will hold the
        array: any CPU device, or a GPU that holds the part. What views the rows must be done before `release`.
        Raises ValueError once released, for a shape that holds more rows than the lease, and for another GPU.
        """
        if self.serial not in self.pool._leases:
            raise ValueError(f"lease {self.serial} is released: its rows may be another's")
        spec = self.pool.spec
        shape = (self.counts[shard],) if shape is None else shape
        if math.prod(shape) > self.counts[shard]:
            raise ValueError(f"a view of {shape} rows on a lease of {self.counts[shard]}")
        owner, address, kind = self.pool._place(self.starts[shard], device)
        return DLPackView(owner, address, (*shape, spec.width), spec.dtype, (kind, device))

    def release(self) -> None:
        """give the rows back; a second time raises ValueError"""
        self.pool._give_back(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _rows_per_unit(row_bytes: int) -> int:
    """how many rows lie between two rows that start on an aligned address"""
    return ALIGNMENT // math.gcd(ALIGNMENT, row_bytes)
