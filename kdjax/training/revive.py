"""An engine that may die: what it was asked is asked again of a fresh one, so often and no more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from bridge.client import RemoteEngine
from bridge.errors import EngineError
from kdjax.errors import UserError, first_line

Answer = TypeVar("Answer")


class Revived:
    """Asks an engine and, where it dies or misses a deadline, starts it anew and asks again.

    Only an engine that is gone is started again: one that lives and answers with a fault would answer so again.

    Args:
        engine: as started from its model folder; a restart has the weights of that folder.
        restarts: how often one question may be repeated.
        tell: takes one line for each restart.
        restarted: called after each, before the question is asked again.
        group: of the configuration, whose ``restarts`` says how often.
        limit: the key that says how long a prompt may be.
    """

    def __init__(
        self,
        engine: RemoteEngine,
        restarts: int,
        tell: Callable[[str], None],
        restarted: Callable[[RemoteEngine], None] = lambda engine: None,
        *,
        group: str = "teacher",
        limit: str = "data.max_len",
    ) -> None:
        self.engine, self.count = engine, 0
        self._restarts, self._tell, self._restarted = restarts, tell, restarted
        self._group, self._limit = group, limit
        self._turn, self._ended = threading.Lock(), False

    def ask(self, question: Callable[[RemoteEngine], Answer]) -> Answer:
        """The answer to ``question(engine)``. Several threads may ask.

        Raises EngineError where the engine fails for good, with the place of its log, and UserError for what it was
        asked and cannot do, such as a prompt beyond its limit.
        """
        tried = 0
        while True:
            asked = None
            try:
                if tried:
                    self._revive()
                asked = self.engine.pid
                return question(self.engine)
            except ValueError as error:
                raise UserError(f"{self._group} {self.engine.spec.model}: {error}; see {self._limit}") from None
            except EngineError as error:
                lives = asked is not None and self.engine.pid == asked
                if lives or self._ended:
                    raise
                if tried == self._restarts:
                    raise EngineError(f"{error}\n(started again {tried} times; {self._group}.restarts)") from None
                tried, self.count = tried + 1, self.count + 1
                self._tell(
                    f"{first_line(error)}; starting it again, {tried} of {self._restarts} (log: {self.engine.log})"
                )

    def end(self) -> None:
        """From now on a dead engine stays dead."""
        self._ended = True

    def _revive(self) -> None:
        with self._turn:
            if self.engine.pid is None:  # else another thread was quicker
                self.engine.restart()
                self._restarted(self.engine)
