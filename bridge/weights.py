"""Named arrays through shared memory, bucket by bucket: packed by the trainer, read as torch tensors by the engine."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np

from bridge.dlpack import ALIGNMENT
from bridge.hidden_pool import create_segment, remove_segment


@dataclass(frozen=True)
class Entry:
    """One tensor of a bucket: where in the segment it starts, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class WeightBucket:
    """A shared segment that a weight update fills again and again. A context manager: the segment goes at the end."""

    def __init__(self, size: int):
        self.size = size
        self.path, self._descriptor = create_segment("weights", size)
        self._bytes = np.frombuffer(mmap(self._descriptor, size), np.uint8)

    def fill(self, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[list[Entry]]:
        """pack arrays in order; yields each time the bucket is full, and must be resumed only once it has been read

        Raises ValueError for an array larger than the bucket.
        """
        entries: list[Entry] = []
        offset = 0
        for name, array in tensors:
            if array.nbytes > self.size:
                raise ValueError(f"weight {name} of {array.nbytes} bytes exceeds the bucket of {self.size}: raise it")
            if offset + array.nbytes > self.size:
                yield entries
                entries, offset = [], 0
            source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._bytes[offset : offset + array.nbytes] = source
            entries.append(Entry(name, array.dtype.name, array.shape, offset))
            offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if entries:
            yield entries

    def __enter__(self) -> "WeightBucket":
        return self

    def __exit__(self, *_: object) -> None:
        remove_segment(self.path, self._descriptor)


def named_tensors(path: str, entries: Iterable[Entry]) -> list[tuple[str, Any]]:
    """the bucket's tensors as torch tensors that view the segment: valid until the trainer fills it again"""
    import torch

    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
    tensors = []
    for entry in entries:
        count = int(np.prod(entry.shape, dtype=np.int64))
        tensor = torch.frombuffer(memory, dtype=getattr(torch, entry.dtype), count=count, offset=entry.offset)
        tensors.append((entry.name, tensor.view(entry.shape)))
    return tensors
