"""The loader that SGLang calls for a bucket of weights: each of its processes reads the bucket for itself.

It is registered through SGLang's own option `custom_weight_loader` and runs in the scheduler's process, on every
tensor-parallel rank. What SGLang carries to it is a description of a few kB; the weights are never pickled.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bridge.bucket_tensors import load_bucket
from bridge.weight_sync import BucketSpec, Entry

LOADER = f"{__name__}.load"


def described(spec: BucketSpec, entries: Sequence[Entry]) -> list[tuple[str, torch.Tensor]]:
    """a bucket and what is in it, in the form of the named tensors that SGLang carries"""
    text = json.dumps([asdict(spec), [asdict(entry) for entry in entries]])
    return [("bucket", torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))]


def load(model: Any, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """give `model` the weights of the bucket that `named_tensors` describe"""
    ((_, content),) = named_tensors
    spec, entries = json.loads(bytes(content.cpu().numpy()))
    entries = [Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries]
    load_bucket(BucketSpec(**spec), entries, model.load_weights)
