"""Batches by a budget of tokens: which lengths rows may have, how many rows fit, and which documents go next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kdjax.errors import UserError

SHAPES = 8  # lengths of rows at most, since a step is compiled for each
WINDOW = 16  # budgets of tokens that are read ahead, so that like lengths can be put together


@dataclass(frozen=True)
class TokenBudget:
    """Batches of one document a row, of about ``tokens`` positions each: rows are many or long, never both.

    ``tokens`` counts an optimizer step's positions, padding included, over ``accumulate`` micro-batches of ``shards``
    data shards; a batch holds at most so many. Raises UserError where not even one row a shard fits.
    """

    tokens: int
    max_len: int
    accumulate: int = 1
    shards: int = 1

    def __post_init__(self) -> None:
        if self.rows(self.max_len) == 0:
            least = self.accumulate * self.shards * self.max_len
            raise UserError(
                f"train.tokens_per_batch={self.tokens} leaves no row of data.max_len={self.max_len} tokens for each of "
                f"{self.shards} data shards (train.accumulate={self.accumulate}); make it at least {least}"
            )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in a row (S), ascending: ``max_len``, three quarters and half of it, and so on downwards."""
        unit = min(64, max(1, self.max_len // 8))  # kernels like multiples of 64
        found: list[int] = []
        for halvings in range(SHAPES):
            for quarters in (4, 3):
                length = min(self.max_len, math.ceil(self.max_len * quarters / 4 / 2**halvings / unit) * unit)
                found += [length] if length not in found else []
        return tuple(sorted(found[:SHAPES]))

    def rows(self, length: int) -> int:
        """Rows of ``length`` tokens in a micro-batch, equally many a shard."""
        return self.tokens // (self.accumulate * self.shards * length) * self.shards

    def documents(self, length: int) -> int:
        """Documents of a batch of rows of ``length``."""
        return self.accumulate * self.rows(length)

    def fit(self, tokens: int) -> int:
        """The shortest row that holds a document."""
        return next(length for length in self.lengths if tokens <= length)

    def choose(self, waiting: Sequence[int]) -> tuple[int, list[int]]:
        """The next batch out of documents of these lengths, oldest first: tokens in a row, and who goes.

        It is the oldest one's turn, with those that fit the same row, by age; where they are too few, the longest
        of the shorter ones fill it up. So nothing waits for long, and the outcome depends on the arguments alone.
        """
        sizes = np.asarray(waiting)
        length = self.fit(int(sizes[0]))
        shorter = max((other for other in self.lengths if other < length), default=0)
        same = np.flatnonzero((sizes > shorter) & (sizes <= length))
        others = np.flatnonzero(sizes <= shorter)
        others = others[np.argsort(-sizes[others], kind="stable")]
        return length, np.concatenate([same, others])[: self.documents(length)].tolist()
