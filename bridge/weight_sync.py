"""Named arrays through shared memory, bucket by bucket, as the trainer packs them; engines read by `bucket_tensors`.

On a CPU a bucket is a file in /dev/shm. On a GPU it is a plain allocation that engines open by CUDA IPC: arrays are
copied into it, and out of it, on the device, and only names, shapes and offsets travel by socket.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np

from bridge.cuda import Allocation, gpus
from bridge.dlpack import ALIGNMENT
from bridge.segments import create_segment, removed_with


@dataclass(frozen=True)
class Entry:
    """One tensor of a bucket: where in the bucket it starts, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class BucketSpec:
    """Where a bucket of `size` bytes lies: a file's path, or a GPU's UUID and the allocation's CUDA IPC handle."""

    size: int
    path: str = ""
    gpu: str = ""
    handle: str = ""
    """hexadecimal"""


class WeightBucket:
    """Shared host memory that weight updates fill again and again with NumPy arrays."""

    def __init__(self, size: int):
        path, descriptor = create_segment("weights", size, "weights", "send them in smaller buckets")
        self.spec = BucketSpec(size, path=path)
        self._bytes = np.frombuffer(mmap(descriptor, size), np.uint8)
        self._remove = removed_with(self, path, descriptor)

    def fill(self, tensors: Iterable[tuple[str, Any]]) -> Iterator[list[Entry]]:
        """pack arrays in order; yields each time the bucket is full, and must be resumed only once it has been read

        Raises ValueError for an array larger than the bucket.
        """
        entries: list[Entry] = []
        offset, size = 0, self.spec.size
        for name, array in tensors:
            if array.nbytes > size:
                raise ValueError(f"weight {name} of {array.nbytes} bytes exceeds the bucket of {size}: raise it")
            if offset + array.nbytes > size:
                self._arrive()
                yield entries
                entries, offset = [], 0
            self._put(offset, array)
            entries.append(Entry(name, array.dtype.name, tuple(array.shape), offset))
            offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if entries:
            self._arrive()
            yield entries

    def close(self) -> None:
        """let go of the memory, once no engine reads it any more"""
        self._remove()

    def _put(self, offset: int, array: Any) -> None:
        self._bytes[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def _arrive(self) -> None:
        """return when all that was put is in the bucket"""


class DeviceBucket(WeightBucket):
    """The same in memory of GPU `ordinal`, an even number of bytes, for JAX arrays that lie there whole."""

    def __init__(self, size: int, ordinal: int):
        """raises EngineError where the GPU has not so much free"""
        self._allocation = Allocation(ordinal, size, "weights")
        self.spec = BucketSpec(size, gpu=gpus()[ordinal], handle=self._allocation.handle().hex())
        self._waiting: list[tuple[int, Any]] = []  # also keeps the arrays from being freed before they are copied

    def fill(self, tensors: Iterable[tuple[str, Any]]) -> Iterator[list[Entry]]:
        self._waiting.clear()  # of an update that broke off
        return super().fill(tensors)

    def close(self) -> None:
        del self._allocation

    def _put(self, offset: int, array: Any) -> None:
        self._waiting.append((offset, array))

    def _arrive(self) -> None:
        # One wait for a bucketful instead of one a tensor: JAX makes them all while the first is waited for.
        for _, array in self._waiting:
            array.block_until_ready()
        for offset, array in self._waiting:
            self._allocation.copy_in(offset, array.unsafe_buffer_pointer(), array.nbytes)
        self._allocation.wait()
        self._waiting.clear()
