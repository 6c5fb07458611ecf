"""How much of the generation a run did not have to wait for: its trainer's seconds of waiting, read while it waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Waits:
    """A clock that runs while the trainer waits for its next batch; read from the thread that makes batches.

    What it gains while responses are written is the part of their seconds that stood in the way of training. The rest
    was hidden behind it.
    """

    def __init__(self) -> None:
        # Seconds of the waits that are over and the beginning of the one that is not: one object, so that a reader in
        # another thread never sees half a change.
        self._state: tuple[float, float | None] = (0.0, None)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the trainer waits."""
        self._state = (self._state[0], time.perf_counter())
        try:
            yield
        finally:
            self._state = (self.seconds(), None)

    def seconds(self) -> float:
        """All that was waited until now."""
        over, since = self._state
        return over if since is None else over + time.perf_counter() - since
