"""The resumable stream of batches: read, shuffle, mix, tokenize (grain), pack, lay out."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import grain
import numpy as np

from kdjax.data.batch import Document, HostBatch, collate
from kdjax.data.budget import WINDOW, TokenBudget
from kdjax.data.packing import pack
from kdjax.data.prepare import Prepared, first_documents, open_sources
from kdjax.data.source import LOSSES, BatchSource, Statistics
from kdjax.errors import UserError

# Documents read for a group of rows, as a share of what the rows hold: the surplus gives the packer something to choose
# from, and what finds no room opens the next group.
SURPLUS = 1.25

Waiting = list[tuple[tuple[int, int], Document]]  # documents with their names: the row they are from, number within it


class DataStream(BatchSource):
    """An iterator of HostBatches whose order depends on the data, the configuration and the seed alone.

    Args:
      data: the ``data`` group of the configuration (or anything with the same fields); rows have its
        ``max_len`` tokens (S).
      tokenizer: a fast transformers tokenizer.
      batch: rows in a micro-batch (B), over all data shards; ``accumulate`` (A) of them make a HostBatch.
      tokens_per_batch: instead of ``batch``, positions in a HostBatch (``TokenBudget``); nothing is packed then.
      shards: data shards (G); must divide ``batch``.
      seed: decides order and mixture.
      epochs: passes over the data; None never ends. Several sources mixed by weight count as one data set with as many
        rows as all of them together.
      vocab_size: ids of the model; a row with others is malformed.
      sources: ``data.train`` by default.
      in_order: one source after the other, in file order and without weights (packing still groups documents).
      max_rows: read at most this many rows in all.

    At the end of the data the last batch is filled up with padding, so every document is seen once an epoch; nothing is
    dropped. With packing, rows are filled ``data.packing_bins`` at a time, so a few documents of two epochs may share a
    row; with a budget of tokens no batch holds documents of two epochs. All processes of a run read the same stream and
    take their part of each batch.

    ``templated`` says whether any of its rows goes through the chat template.

    Raises UserError for bad input, while opening or when the row comes up.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any,
        *,
        batch: int | None = None,
        tokens_per_batch: int | None = None,
        accumulate: int = 1,
        shards: int = 1,
        seed: int = 0,
        epochs: float | None = None,
        vocab_size: int | None = None,
        sources: Sequence[Any] | None = None,
        in_order: bool = False,
        max_rows: int | None = None,
    ):
        if (batch is None) == (tokens_per_batch is None):
            raise ValueError("a stream's batches have either `batch` rows or `tokens_per_batch` positions")
        if batch is not None and batch % shards:
            raise UserError(f"train: a micro-batch of {batch} rows does not divide over {shards} data shards")
        self._rows_each = batch
        self._packed = data.packing and batch is not None
        self._parts = {"accumulate": accumulate, "shards": shards}
        self._seq_len = data.max_len
        self._budget = None
        if tokens_per_batch is not None:
            self._budget = TokenBudget(tokens_per_batch, self._seq_len, **self._parts)
        sources = data.train if sources is None else sources
        opened = open_sources(sources, data, tokenizer, max_len=self._seq_len, vocab_size=vocab_size, seed=seed)
        super().__init__(data, seed, [len(rows) for rows, _ in opened])
        self._opened = opened
        self.templated = any(source.templated for source in opened)
        weights = [None if in_order else source.weight for source in sources]
        self._rows = order_rows([rows for rows, _ in opened], weights, data.shuffle and not in_order, seed)
        ends = [] if epochs is None else [max(1, round(epochs * self.rows_per_epoch))]
        self._end = min([*ends, *([] if max_rows is None else [max_rows])], default=None)
        self._reader = self._read()
        self._loss_sizes: dict[int, set[int]] = defaultdict(set)  # by the rows' length
        self._start_group(next_row=0, waiting=[])

    def __next__(self) -> HostBatch:
        before = self.statistics.of_rows()
        if self._budget is None:
            length, batch = self._seq_len, self._rows_each
            rows = list(itertools.islice(self._packed_rows(), batch * self._parts["accumulate"]))
        else:
            length, rows = self._chosen_rows()
            batch = self._budget.rows(length)
        if not rows:
            raise StopIteration
        known = self._loss_sizes[length]
        host = collate(rows, seq_len=length, batch=batch, known=known, packed=self._packed, **self._parts)
        self._loss_sizes[length].add(host.batch.rows.shape[-1])
        self.statistics.batches += 1
        self.statistics.tokens += host.tokens
        self.statistics.loss_tokens += host.loss_tokens
        self.statistics.positions += host.tokens + host.padding
        lost = self.statistics.of_rows()
        first = tuple(
            f"the first {LOSSES[name.removeprefix('data/')]}; {name} counts them" for name in lost if name not in before
        )
        return replace(host, state=self.state(), report=lost, notes=first)

    def state(self) -> dict[str, Any]:
        """The position after the last batch: plain numbers, ready for JSON. Exact, inside a group of rows too."""
        return self._identity() | {
            "group": self._group,
            "emitted": self._emitted,
            "loss_sizes": {str(length): sorted(sizes) for length, sizes in self._loss_sizes.items()},
            "statistics": asdict(self.statistics),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Batch, accumulation and shards may differ from those of the run that saved it.

        Raises UserError when the data or the seed are not the same.
        """
        self._refuse_others(state)
        group = state["group"]
        self._loss_sizes.clear()
        self._loss_sizes |= {int(length): set(sizes) for length, sizes in state["loss_sizes"].items()}
        wanted = {tuple(name) for name in group["waiting"]}
        first = min((row for row, _ in wanted), default=group["next_row"])
        self._reader.set_state({"next_index": first})
        waiting = []
        for row in range(first, group["next_row"]):
            documents = next(self._reader).documents
            waiting += [((row, i), d) for i, d in enumerate(documents) if (row, i) in wanted]
        self.statistics = Statistics(**group["read"])
        self._start_group(group["next_row"], waiting, group["number"])
        if state["emitted"]:
            self._fill()
            self._emitted = state["emitted"]
        self.statistics = Statistics(**state["statistics"])

    def close(self) -> None:
        """Stop the reading threads."""
        self._reader.close()

    def estimate_batches(self, epochs: float = 1.0, sample: int = 1000) -> int:
        """How many batches ``epochs`` passes make, judged by packing at most ``sample`` rows spread over the data.

        Reads and tokenizes those rows anew. With a budget of tokens all batches count as full, those at the end of an
        epoch too. Depends on data, configuration and seed alone, so an interrupted run and an uninterrupted one get the
        same number.
        """
        total = max(1, round(epochs * self.rows_per_epoch))
        count = min(sample, self.rows_per_epoch)
        chosen = (self._rows[i * self.rows_per_epoch // count] for i in range(count))
        lengths = [len(d) for prepared in chosen for d in prepared.documents]
        if self._budget is not None:
            share = sum(1 / self._budget.documents(self._budget.fit(length)) for length in lengths)
            return max(1, math.ceil(share * total / count))
        rows = len(lengths)
        if self._data.packing:
            rows, left = 0, lengths
            while left:
                window = left[: max(1, _window(left, self._data.packing_bins * self._seq_len * SURPLUS))]
                filled, rest = pack(window, rows=self._data.packing_bins, seq_len=self._seq_len)
                rows += len(filled)
                left = [window[i] for i in rest] + left[len(window) :]
        return max(1, -(-rows * total // (count * self._rows_each * self._parts["accumulate"])))

    def sample(self, count: int) -> list[Document]:
        """At most ``count`` documents from the start of the sources; see ``first_documents``."""
        return first_documents(self._opened, count)

    def _read(self) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=self._data.workers, prefetch_buffer_size=16 * self._data.workers)
        rows = self._rows if self._end is None else self._rows.slice(slice(0, self._end))
        return iter(rows.to_iter_dataset(options))

    def _start_group(self, next_row: int, waiting: Waiting, number: int = 0) -> None:
        """Begin a group of rows: remember what it takes to build it again, in values that are never changed."""
        self._next_row, self._waiting = next_row, waiting
        self._group = {
            "number": number,
            "next_row": next_row,
            "waiting": [list(name) for name, _ in waiting],
            "read": asdict(self.statistics),
        }
        self._filled: list[list[Document]] | None = None
        self._emitted = 0

    def _packed_rows(self) -> Iterator[list[Document]]:
        """Rows without end, or to the end of the data; each is counted as it is handed out."""
        while True:
            if self._filled is None:
                self._fill()
            if not self._filled:
                return
            while self._emitted < len(self._filled):
                self._emitted += 1
                yield self._filled[self._emitted - 1]
            self._start_group(self._next_row, self._left, self._group["number"] + 1)

    def _fill(self) -> None:
        """Read documents and pack them into the rows of this group."""
        rows, first = self._data.packing_bins, len(self._waiting)
        waiting, tokens = list(self._waiting), sum(len(d) for _, d in self._waiting)
        enough = rows * self._seq_len * SURPLUS
        while tokens < enough if self._data.packing else len(waiting) < rows:
            documents = self._next_documents()
            if documents is None:
                break
            waiting += documents
            tokens += sum(len(d) for _, d in documents)
        if self._data.packing:
            lengths = [len(d) for _, d in waiting]
            filled, left = pack(lengths, rows=rows, seq_len=self._seq_len, first=first)
            # packed longest first: without this, batches would come sorted by length
            np.random.default_rng([self._seed, self._group["number"]]).shuffle(filled)
        else:
            filled, left = [[i] for i in range(len(waiting))][:rows], list(range(rows, len(waiting)))
        self._filled = [[waiting[i][1] for i in row] for row in filled]
        self._left = [waiting[i] for i in left]

    def _chosen_rows(self) -> tuple[int, list[list[Document]]]:
        """The length of rows and the documents, one a row, of the next batch within the budget: a group of its own."""
        waiting, tokens = list(self._waiting), sum(len(d) for _, d in self._waiting)
        while not waiting or (tokens < WINDOW * self._budget.tokens and self._next_row % self.rows_per_epoch):
            documents = self._next_documents()
            if documents is None:
                break
            waiting += documents
            tokens += sum(len(d) for _, d in documents)
        if not waiting:
            return self._seq_len, []
        length, chosen = self._budget.choose([len(d) for _, d in waiting])
        gone = set(chosen)
        left = [named for i, named in enumerate(waiting) if i not in gone]
        self._start_group(self._next_row, left, self._group["number"] + 1)
        return length, [[waiting[i][1]] for i in chosen]

    def _next_documents(self) -> Waiting | None:
        """Documents of the next row, each with its name (row, number); None at the end of the data."""
        prepared: Prepared | None = next(self._reader, None)
        if prepared is None or (not self.statistics.documents and self.statistics.rows >= self.rows_per_epoch):
            if not self.statistics.documents:
                raise UserError(self._why_nothing())
            return None
        if prepared.bad is not None:
            self._refuse_bad(prepared.bad)
        seen = self.statistics
        seen.rows += 1
        seen.documents += len(prepared.documents)
        seen.skipped += prepared.bad is not None
        seen.dropped += prepared.dropped
        seen.truncated += prepared.truncated
        seen.without_loss += prepared.without_loss
        seen.longest = max(seen.longest, prepared.longest)
        self._next_row += 1
        return [((self._next_row - 1, i), d) for i, d in enumerate(prepared.documents)]

    def _why_nothing(self) -> str:
        seen = self.statistics
        parts = [
            (seen.skipped, "malformed"),
            (seen.dropped, f"longer than data.max_len={self._seq_len} (the longest has {seen.longest} tokens)"),
            (seen.without_loss, "without a token that carries loss"),
        ]
        counts = ", ".join(f"{count} {what}" for count, what in parts if count)
        return f"data: none of the {seen.rows} rows can be trained on: {counts}"


def eval_batches(
    data: Any,
    tokenizer: Any,
    *,
    batch: int,
    shards: int = 1,
    max_rows: int | None = None,
    vocab_size: int | None = None,
    sources: Sequence[Any] | None = None,
) -> list[HostBatch]:
    """Every row of ``data.eval`` once, in file order before packing; the last batch is filled up with padding.

    ``max_rows`` takes the first so many rows of all sources together. Arguments and errors otherwise as DataStream's.
    """
    stream = DataStream(
        data,
        tokenizer,
        batch=batch,
        shards=shards,
        epochs=1,
        vocab_size=vocab_size,
        sources=data.eval if sources is None else sources,
        in_order=True,
        max_rows=max_rows,
    )
    try:
        return list(stream)
    finally:
        stream.close()


def order_rows(
    opened: list[grain.MapDataset], weights: list[float | None], shuffle: bool, seed: int
) -> grain.MapDataset:
    """All sources as one endless dataset: shuffled anew every epoch, mixed by weight or, without weights, by size."""
    if len(opened) > 1 and any(weight is not None for weight in weights):
        if any(weight is None for weight in weights):
            raise UserError("data: some sources have a weight and some have none; give each one, or none")
        endless = [(rows.shuffle() if shuffle else rows).repeat(None) for rows in opened]
        return grain.MapDataset.mix(endless, weights)
    rows = grain.MapDataset.concatenate(opened) if len(opened) > 1 else opened[0]
    return (rows.shuffle(seed % 2**32) if shuffle else rows).repeat(None)


def _window(lengths: Sequence[int], tokens: float) -> int:
    """How many of these documents are read until they hold ``tokens`` tokens."""
    return int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
