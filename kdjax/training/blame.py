"""Which documents of a batch are to blame where a step is not finite."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.data import Batch, HostBatch
from kdjax.data.batch import Placed
from kdjax.training.device_batch import DeviceBatch
from kdjax.training.step import Step

LIMIT = 4  # documents that are named


def blame(step: Step, batch: DeviceBatch) -> tuple[str, list[str]]:
    """What is not finite in ``batch``, and the places (``file:line``) of at most LIMIT documents that cause it.

    The teacher's rows are looked at as they are. If they are sound, loss and gradient are computed of halves of the
    batch, halves of those and so on, everything else being padding, so this takes a few steps' time. No place is named
    where no document fails by itself under the present parameters.
    """
    arrays, host = batch.arrays, batch.host
    if guilty := [p for p in host.documents if any(_bad(rows, p, host) for rows in _unsound(arrays))]:
        return "the teacher's hidden rows are", [p.document.source for p in guilty[:LIMIT]]
    guilty = _search(host.documents, lambda documents: step.sound(_only(arrays, host, documents)))
    return "loss or gradient is", [p.document.source for p in guilty]


def _unsound(arrays: Batch) -> list[np.ndarray]:
    """bool [A, G·N] a teacher: rows with a number that is not finite."""
    return [np.asarray(jax.jit(lambda x: ~jnp.isfinite(x).all(-1))(rows)) for rows in arrays.teacher_hidden]


def _rows(placed: Placed, host: HostBatch) -> slice:
    start = placed.shard * host.batch.rows.shape[-1] + placed.offset
    return slice(start, start + len(placed.document.labels))


def _bad(unsound: np.ndarray, placed: Placed, host: HostBatch) -> bool:
    return bool(unsound[placed.micro, _rows(placed, host)].any())


def _only(arrays: Batch, host: HostBatch, documents: Sequence[Placed]) -> Batch:
    """The batch with ``documents`` alone; all else is padding, and the teacher's rows there are zero."""
    changed = {"tokens": np.zeros_like(host.batch.tokens), "mask": np.zeros_like(host.batch.mask)}
    if host.batch.segment_ids is not None:
        changed["segment_ids"] = np.zeros_like(host.batch.segment_ids)
    for p in documents:
        place = (p.micro, p.row, slice(p.start, p.start + len(p.document)))
        for name in changed.keys() - {"mask"}:
            changed[name][place] = getattr(host.batch, name)[place]
        changed["mask"][p.micro, _rows(p, host)] = True
    changed = {name: jax.device_put(x, getattr(arrays, name).sharding) for name, x in changed.items()}
    hidden = tuple(jnp.where(changed["mask"][..., None], rows, 0) for rows in arrays.teacher_hidden)
    return replace(arrays, **changed, teacher_hidden=hidden)


def _search(documents: Sequence[Placed], sound: Callable[[Sequence[Placed]], bool]) -> list[Placed]:
    """The first LIMIT documents that are not ``sound`` by themselves."""
    found: list[Placed] = []
    left = deque([documents])
    while left and len(found) < LIMIT:
        part = left.popleft()
        if sound(part):
            continue
        if len(part) == 1:
            found += part
        else:
            left.extendleft([part[len(part) // 2 :], part[: len(part) // 2]])
    return found
