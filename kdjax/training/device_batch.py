"""One global batch where the step reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from kdjax.data import Batch, HostBatch


@dataclass
class DeviceBatch:
    """One global batch on the mesh: ``arrays`` are stacked ``[A, ...]`` over micro-batches.

    The teacher's rows alias pool memory. ``release_after(x)`` gives them back once ``x``, a number that the step which
    read them puts out, is ready; where it is NaN they stay, to be looked at. The compiled step calls it by itself.
    """

    arrays: Batch
    host: HostBatch
    seconds: dict[str, float] = field(default_factory=dict)
    """How long the teacher, the transfer and the wait for them took."""
    release_after: Any = lambda array: None
    by_row: dict[str, jax.Array] = field(default_factory=dict)
    """What the step that used it says of each loss row, [A, G·N], by term."""
