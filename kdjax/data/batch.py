"""Documents, and the static batches they are laid out in: the one place where targets are shifted.

Row t of a document carries loss when token t+1 is one of its loss tokens; its label is that token. Everything after
this module works on loss rows and never shifts again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from kdjax.arrays import AnyArray

BUCKETS = 8  # N takes one of this many sizes, so a step is compiled at most this many times

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Document:
    """One tokenized text. ``loss[t]`` says that token t, as a target, carries loss; the first token never does.

    ``teacher_ids`` and ``teacher_loss`` are there when the teacher reads another prompt (context distillation). Its
    loss tokens are then the very same tokens in the same order, so row i of one lines up with row i of the other.
    ``extras`` are numbers known of each loss token, by name.
    """

    ids: Int32[np.ndarray, " T"]
    loss: Bool[np.ndarray, " T"]
    source: str
    teacher_ids: Int32[np.ndarray, " U"] | None = None
    teacher_loss: Bool[np.ndarray, " U"] | None = None
    extras: Mapping[str, Float[np.ndarray, " n"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ids.shape != self.loss.shape or self.ids.ndim != 1 or not self.ids.size or self.loss[0]:
            raise ValueError(f"{self.source}: ids and loss must be equally long and the first token carries no loss")
        if (self.teacher_ids is None) != (self.teacher_loss is None):
            raise ValueError(f"{self.source}: teacher_ids and teacher_loss go together")
        if self.teacher_ids is not None and not np.array_equal(self.teacher_labels, self.labels):
            raise ValueError(f"{self.source}: the teacher's loss tokens differ from the student's")
        for name, values in self.extras.items():
            if values.shape != self.labels.shape:
                raise ValueError(
                    f"{self.source}: {name} has {values.shape} numbers for {self.labels.shape} loss tokens"
                )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def loss_rows(self) -> Int32[np.ndarray, " n"]:
        """Positions whose next token is a loss token, ascending."""
        return np.flatnonzero(self.loss[1:]).astype(np.int32)

    @cached_property
    def labels(self) -> Int32[np.ndarray, " n"]:
        return self.ids[self.loss_rows + 1]

    @property
    def teacher_labels(self) -> Int32[np.ndarray, " n"]:
        ids, loss = self.teacher_view
        return ids[np.flatnonzero(loss[1:]) + 1]

    @property
    def teacher_view(self) -> tuple[Int32[np.ndarray, " U"], Bool[np.ndarray, " U"]]:
        """What the teacher reads: its own ids and loss mask, or the student's."""
        return (self.ids, self.loss) if self.teacher_ids is None else (self.teacher_ids, self.teacher_loss)

    @cached_property
    def teacher_request(self) -> tuple[Int32[np.ndarray, " U"], Spans]:
        """Ids for the teacher's prefill, and the runs of its rows that carry loss: as many rows as ``labels``."""
        ids, loss = self.teacher_view
        return ids, _runs(loss[1:])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One micro-batch, or a stack of A of them with a leading axis; numpy on the host, jax.Array on devices.

    Segment 0 is padding, segments count from 1 within a row and positions restart with each. Without packing there are
    no segments (None): a row is one document with padding behind it, which causal attention never sees, so that no
    kernel has to mask anything else. ``rows`` index the
    flattened ``[B/G * S]`` positions of a data shard, so gathering never leaves the shard; padding entries are 0, with
    ``mask`` False. ``teacher_hidden`` has one array a teacher and is filled in by whatever asked the teachers.
    ``extras`` are further numbers of each loss row, by name; a batch of data has none, one of rollouts says how each
    token was sampled.
    """

    tokens: Int32[AnyArray, "*A B S"]
    positions: Int32[AnyArray, "*A B S"]
    segment_ids: Int32[AnyArray, "*A B S"] | None
    rows: Int32[AnyArray, "*A G N"]
    labels: Int32[AnyArray, "*A G*N"]
    mask: Bool[AnyArray, "*A G*N"]
    teacher_hidden: tuple[Any, ...] = ()
    extras: dict[str, Float[AnyArray, "*A G*N"]] = field(default_factory=dict)

    def gather(self, x: Float[AnyArray, "B S D"]) -> Float[Array, "{self.rows.size} D"]:
        """The loss rows of ``x``, shard after shard; padding entries repeat the shard's first row."""
        shards, count = self.rows.shape
        local = x.reshape(shards, -1, x.shape[-1])
        return jnp.take_along_axis(local, self.rows[:, :, None], axis=1).reshape(shards * count, x.shape[-1])


@dataclass(frozen=True)
class Placed:
    """Where a document went. Its n loss rows are ``rows[micro, shard, offset : offset + n]``, and its teacher rows
    belong at the same offset of the same shard; its tokens stand in row ``row`` from column ``start`` on."""

    document: Document
    micro: int
    shard: int
    offset: int
    row: int
    start: int


@dataclass(frozen=True)
class HostBatch:
    """All micro-batches of one optimizer step, still on the host.

    ``tokens`` counts positions that hold a token, ``padding`` the others, ``loss_tokens`` the rows that carry loss.
    ``state`` is the stream's position right after this batch: save it with the step that used the batch. ``report`` are
    numbers about how it was made, ``seconds`` what that took, and ``notes`` lines that a person should see.
    """

    batch: Batch
    documents: tuple[Placed, ...]
    tokens: int
    loss_tokens: int
    padding: int
    state: dict[str, Any] = field(default_factory=dict, compare=False)
    report: dict[str, float] = field(default_factory=dict, compare=False)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


def bucket(count: int, capacity: int, known: Collection[int] = ()) -> int:
    """The static number of loss rows for ``count`` of at most ``capacity``.

    The smallest of the ``known`` sizes that is large enough, since a step for it is compiled already; else the next
    multiple of an eighth of the capacity that leaves room for batches with an eighth more.
    """
    step = -(-capacity // BUCKETS)
    fitting = [size for size in known if count <= size <= capacity]
    return min(fitting) if fitting else min(capacity, max(1, -(-(count + count // 8) // step)) * step)


def collate(
    rows: Sequence[Sequence[Document]],
    *,
    batch: int,
    seq_len: int,
    accumulate: int = 1,
    shards: int = 1,
    known: Collection[int] = (),
    extras: Sequence[str] = (),
    packed: bool = True,
) -> HostBatch:
    """Lay out at most ``accumulate * batch`` rows, each a list of documents, as one HostBatch.

    Rows are dealt to micro-batches and data shards so that each gets nearly as many loss rows, and tokens for a teacher
    to read. N is the largest number of loss rows, raised to a static size (``bucket``, with the ``known`` ones).
    Missing rows are padding. The batch gets these ``extras`` of the documents, 0 where a document has none. Not
    ``packed``, a row is one document at most, and the batch has no segments.
    """
    if batch % shards:
        raise ValueError(f"{batch} rows do not divide over {shards} data shards")
    if len(rows) > accumulate * batch:
        raise ValueError(f"{len(rows)} rows do not fit {accumulate} micro-batches of {batch}")
    if not packed and max(map(len, rows), default=0) > 1:
        raise ValueError("several documents in a row need segments: packed=True")
    per_shard = batch // shards
    sizes = [(sum(len(d.labels) for d in row), sum(len(d.teacher_view[0]) for d in row)) for row in rows]
    groups = _deal(sizes, accumulate * shards, per_shard)
    loss_rows = [sum(len(d.labels) for i in group for d in rows[i]) for group in groups]
    size = bucket(max(loss_rows), per_shard * seq_len, known)

    shape = (accumulate, batch, seq_len)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    index, labels = (np.zeros((accumulate, shards, size), np.int32) for _ in range(2))
    mask = np.zeros((accumulate, shards, size), bool)
    numbers = {name: np.zeros((accumulate, shards, size), np.float32) for name in extras}
    placed = []
    for g, group in enumerate(groups):
        micro, shard = divmod(g, shards)
        offset = 0
        for slot, i in enumerate(group):
            row, start = shard * per_shard + slot, 0
            for segment, document in enumerate(rows[i], start=1):
                stop, end = start + len(document), offset + len(document.labels)
                if stop > seq_len:
                    raise ValueError(f"{document.source}: does not fit a row of {seq_len} tokens")
                tokens[micro, row, start:stop] = document.ids
                positions[micro, row, start:stop] = np.arange(len(document))
                segments[micro, row, start:stop] = segment
                index[micro, shard, offset:end] = document.loss_rows + (slot * seq_len + start)
                labels[micro, shard, offset:end] = document.labels
                mask[micro, shard, offset:end] = True
                for name in numbers.keys() & document.extras.keys():
                    numbers[name][micro, shard, offset:end] = document.extras[name]
                placed.append(Placed(document, micro, shard, offset, row, start))
                start, offset = stop, end
    flat = (accumulate, shards * size)
    used = sum(len(d) for row in rows for d in row)
    numbers = {name: values.reshape(flat) for name, values in numbers.items()}
    return HostBatch(
        batch=Batch(
            tokens,
            positions,
            segments if packed else None,
            index,
            labels.reshape(flat),
            mask.reshape(flat),
            extras=numbers,
        ),
        documents=tuple(placed),
        tokens=used,
        loss_tokens=sum(loss_rows),
        padding=tokens.size - used,
    )


def _deal(sizes: Sequence[tuple[int, int]], groups: int, room: int) -> list[list[int]]:
    """Indices of ``sizes`` in ``groups`` lists of at most ``room``: largest first, each to where it weighs least.

    Sizes are loss rows, which the student's head works on, and the tokens that the teacher reads. Each counts as a
    share of all there are, and a list is as full as the larger of its two shares.
    """
    dealt: list[list[int]] = [[] for _ in range(groups)]
    totals = np.zeros((groups, 2))
    shares = np.asarray(sizes, float).reshape(-1, 2)
    shares /= np.maximum(shares.sum(0), 1)
    for i in sorted(range(len(sizes)), key=lambda i: (shares[i].max(), shares[i].sum()), reverse=True):
        full = (totals + shares[i]).max(1)
        g = min((g for g in range(groups) if len(dealt[g]) < room), key=lambda g: (full[g], len(dealt[g])))
        dealt[g].append(i)
        totals[g] += shares[i]
    return dealt


def _runs(flags: Bool[np.ndarray, " T"]) -> Spans:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))
