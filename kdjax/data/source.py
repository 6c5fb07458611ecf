"""What a training run takes its batches from: one set of manners for rows of files and for a student's responses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdjax.data.batch import Document, HostBatch
from kdjax.errors import UserError

# What may happen to a row or document, in words.
LOSSES = {
    "skipped": "malformed row is left out",
    "dropped": "document longer than data.max_len is left out",
    "truncated": "document longer than data.max_len is cut",
    "without_loss": "document without a token to learn from is left out",
}


@dataclass
class Statistics:
    """What the stream has read and handed out so far, for the run's report."""

    rows: int = 0
    """Rows read, the unusable ones included."""
    documents: int = 0
    """Documents made of them."""
    skipped: int = 0
    """Malformed rows (with on_bad_row: skip)."""
    dropped: int = 0
    """Documents longer than max_len that were left out."""
    truncated: int = 0
    """Documents longer than max_len that were cut."""
    without_loss: int = 0
    """Documents without a token to learn from."""
    longest: int = 0
    """Tokens of the longest document, before dropping or cutting."""
    batches: int = 0
    """Batches handed out."""
    tokens: int = 0
    """Tokens in them."""
    loss_tokens: int = 0
    """Tokens that carry loss in them."""
    positions: int = 0
    """Positions in them, padding included."""

    def of_rows(self) -> dict[str, float]:
        """What became of rows and documents that are not used as they are, by the names of metrics; none that is 0."""
        return {f"data/{name}": float(count) for name in LOSSES if (count := getattr(self, name))}

    @property
    def padding(self) -> float:
        """Share of all positions that hold no token."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


class BatchSource(Iterator[HostBatch]):
    """An iterator of HostBatches that stands at a position, from which it goes on exactly as it would have.

    Which batches come depends on data, configuration and seed alone.
    """

    templated: bool
    """Whether any of its rows goes through the chat template."""
    rows_per_epoch: int
    """Rows in one pass over its data."""
    statistics: Statistics

    def __init__(self, data: Any, seed: int, sizes: Sequence[int]) -> None:
        self._data, self._seed, self._sizes = data, seed, list(sizes)
        self.rows_per_epoch = sum(self._sizes)
        self.statistics = Statistics()

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The position after the last batch: plain numbers, ready for JSON. Exact to the batch."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises UserError when the data or the seed are not the same."""

    @abstractmethod
    def estimate_batches(self, epochs: float = 1.0) -> int:
        """How many batches ``epochs`` passes over the data make; the same number whenever it is asked."""

    @abstractmethod
    def sample(self, count: int) -> list[Document]:
        """At most ``count`` usable documents from the start of the data, to compare two engines on."""

    @abstractmethod
    def close(self) -> None:
        """Stop what reads or writes for it."""

    def learned(self, host: HostBatch, log_ratio: np.ndarray | None) -> None:
        """Hear what a step found of ``host``: log q − log p of each loss row, [A, G·N]; None where it tells none."""

    def set_aside(self, number: int) -> None:
        """Keep nothing that was made for step ``number`` and later ones; they are made anew."""

    def _identity(self) -> dict[str, Any]:
        """The part of a position that must be the same when it is gone on from."""
        return {"seed": self._seed, "sizes": self._sizes}

    def _refuse_others(self, state: dict[str, Any]) -> None:
        """Refuse a position in other data."""
        for key, mine in self._identity().items():
            if state[key] != mine:
                what = "seed" if key == "seed" else "number of rows in the sources"
                raise UserError(f"data: the {what} was {state[key]} when the checkpoint was saved and is {mine} now")

    def _refuse_bad(self, fault: str) -> None:
        """Refuse a malformed row, unless such rows are to be left out."""
        if self._data.on_bad_row == "stop":
            raise UserError(f"{fault}; mend the row, or set data.on_bad_row: skip")
