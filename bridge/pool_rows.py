"""What an engine's process sees of the pool: its rows as torch tensors, and the stamps that say what was written."""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch

from bridge.cuda import Mapping, gpus
from bridge.dlpack import CUDA, DLPackView
from bridge.hidden_pool import Block, PoolSpec


class PoolRows:
    """The part of a pool that one process writes: `rank` of the processes that all hold the same hidden rows.

    ranks: the UUIDs of their GPUs, one entry where there is one process or no GPU. Each block of the pool is written
    by one rank, on its own GPU where it can be, so that rows cross between GPUs only where no rank shares the
    student's.
    """

    def __init__(self, spec: PoolSpec, rank: int = 0, ranks: Sequence[str] = ("",)):
        memory, dtype = spec.map(), getattr(torch, spec.dtype)
        self.spec, self.dtype = spec, dtype
        self._stamps = np.frombuffer(memory, np.uint8, spec.copies * spec.rows, spec.stamps_at)
        self._stamps = self._stamps.reshape(spec.copies, spec.rows)
        # Part, number of the copy, and its rows.
        self._copies: list[tuple[int, int, Callable[[], torch.Tensor]]] = []
        if not spec.blocks:
            rows = torch.frombuffer(memory, dtype=dtype, count=spec.rows * spec.width).view(spec.rows, spec.width)
            if rank == 0:
                self._copies = [
                    (part, 0, cache(partial(rows.narrow, 0, part * spec.part_rows, spec.part_rows)))
                    for part in range(spec.parts)
                ]
        for block, number in assigned(spec.blocks, rank, ranks):
            # On another GPU it is mapped at its first row: one of several copies of a teacher is never asked for most
            # of them, and a mapping costs a few hundred megabytes there.
            mapped = cache(partial(_mapped, spec, block))
            self._copies.append((block.part, number, mapped))
            if block.gpu == ranks[rank]:
                mapped()
        self._written: list[tuple[int, int, int]] = []

    @property
    def writes(self) -> bool:
        """whether this rank has anything to write"""
        return bool(self._copies)

    def write(self, row: int, hidden: torch.Tensor) -> None:
        """put [count, width] at the pool's `row` and following, on the current stream; `finish` makes it count"""
        part, at = divmod(row, self.spec.part_rows)
        for where, number, rows in self._copies:
            if where == part:
                _copy(rows()[at : at + len(hidden)], hidden)
                self._written.append((number, row, row + len(hidden)))

    def finish(self) -> None:
        """stamp what was written, once it is there: JAX cannot wait for this process's stream"""
        if self.spec.blocks and self._written:
            torch.cuda.current_stream().synchronize()
        for number, start, stop in self._written:
            self._stamps[number, start:stop] = 1
        self._written.clear()


def _mapped(spec: PoolSpec, block: Block) -> torch.Tensor:
    """a block's rows, on the GPU where they lie"""
    mapping = Mapping(gpus().index(block.gpu), bytes.fromhex(block.handle))
    shape, device = (spec.part_rows, spec.width), (CUDA, mapping.ordinal)
    return torch.from_dlpack(DLPackView(mapping, mapping.address, shape, spec.dtype, device))


def _copy(to: torch.Tensor, hidden: torch.Tensor) -> None:
    """In host memory by memcpy, which chooses its stores by the size; torch's copy reads each line before it writes."""
    alike = hidden.is_cpu and to.is_cpu and hidden.dtype == to.dtype and hidden.shape == to.shape
    if alike and hidden.is_contiguous():
        ctypes.memmove(to.data_ptr(), hidden.data_ptr(), hidden.nbytes)
    else:
        to.copy_(hidden)


def assigned(blocks: Sequence[Block], rank: int, ranks: Sequence[str]) -> list[tuple[Block, int]]:
    """the blocks that `rank` writes, each with its number among the copies of its part

    A block belongs to the rank on its own GPU; blocks on GPUs without a rank are dealt out in turn.
    """
    taken = []
    for index, block in enumerate(blocks):
        number = sum(other.part == block.part for other in blocks[:index])
        writer = ranks.index(block.gpu) if block.gpu in ranks else index % len(ranks)
        if writer == rank:
            taken.append((block, number))
    return taken
