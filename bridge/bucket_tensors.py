"""What an engine's process sees of a bucket of weights: its tensors, viewed where the trainer put them."""

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from bridge.cuda import Mapping
from bridge.dlpack import CUDA, DLPackView
from bridge.segments import map_segment
from bridge.weight_sync import BucketSpec, Entry


def load_bucket(
    spec: BucketSpec, entries: Sequence[Entry], load: Callable[[list[tuple[str, torch.Tensor]]], Any]
) -> None:
    """call `load` with the bucket's tensors; they view the bucket, and have been read when this returns"""
    memory = _opened(spec)
    tensors = []
    for entry in entries:
        dtype = getattr(torch, entry.dtype)
        content = memory[entry.offset : entry.offset + prod(entry.shape) * dtype.itemsize]
        tensors.append((entry.name, content.view(dtype).view(entry.shape)))
    load(tensors)
    if spec.gpu:
        torch.cuda.synchronize()


@functools.lru_cache(maxsize=1)  # a trainer fills one bucket for as long as it lives, so it is opened once
def _opened(spec: BucketSpec) -> torch.Tensor:
    """uint8 [size], on the CPU or on this process's GPU, which may read another's over NVLink"""
    if not spec.gpu:
        return torch.frombuffer(map_segment(spec.path, spec.size), dtype=torch.uint8)
    # Into the address space of this process's own GPU: it needs no context, and so no memory, on the bucket's.
    mapping = Mapping(torch.cuda.current_device(), bytes.fromhex(spec.handle))
    view = DLPackView(mapping, mapping.address, (spec.size // 2,), "bfloat16", (CUDA, mapping.ordinal))
    return torch.from_dlpack(view).view(torch.uint8)
