"""Several documents a row: best-fit decreasing over a group of rows, what does not fit goes first next time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], *, rows: int, seq_len: int, first: int = 0) -> tuple[list[list[int]], list[int]]:
    """Place documents of these lengths into at most ``rows`` rows of ``seq_len`` tokens.

    The first ``first`` documents are placed before all others, so that what an earlier group left over cannot be left
    over again and again; within each part the longest go first, each into the fullest row that has room. Returns the
    indices in each non-empty row and the indices that found no room, in order. Ties go to the earlier document and the
    earlier row: the outcome depends on the arguments alone.
    """
    room = np.full(rows, seq_len)
    filled: list[list[int]] = [[] for _ in range(rows)]
    left = []
    for i in sorted(range(len(lengths)), key=lambda i: (i >= first, -lengths[i])):
        fits = room >= lengths[i]
        if not fits.any():
            left.append(i)
            continue
        row = int(np.where(fits, room, seq_len + 1).argmin())
        filled[row].append(i)
        room[row] -= lengths[i]
    return [row for row in filled if row], sorted(left)
