"""An engine that may die: what it was asked is asked again of a fresh one, so often and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from bridge.client import RemoteEngine
from bridge.errors import EngineError
from kdjax.errors import UserError

Answer = TypeVar("Answer")


class Revived:
    """Asks an engine and, where it dies or misses a deadline, starts it anew and asks again.

    Only an engine that is gone is started again: one that lives and answers with a fault would answer so again.

    Args:
        engine: as started from its model folder; a restart has the weights of that folder.
        restarts: how often one question may be repeated.
        tell: takes one line for each restart.
        restarted: called after each, before the question is asked again.
    """

    def __init__(
        self,
        engine: RemoteEngine,
        restarts: int,
        tell: Callable[[str], None],
        restarted: Callable[[RemoteEngine], None] = lambda engine: None,
    ) -> None:
        self.engine, self.count = engine, 0
        self._restarts, self._tell, self._restarted, self._ended = restarts, tell, restarted, False

    def ask(self, question: Callable[[RemoteEngine], Answer]) -> Answer:
        """The answer to ``question(engine)``.

        Raises EngineError where the engine fails for good, with the place of its log, and UserError for what it was
        asked and cannot do, such as a prompt beyond its limit.
        """
        tried = 0
        while True:
            try:
                if tried:
                    self.engine.restart()
                    self._restarted(self.engine)
                return question(self.engine)
            except ValueError as error:
                raise UserError(f"teacher {self.engine.spec.model}: {error}") from None
            except EngineError as error:
                if self.engine.pid is not None or self._ended:
                    raise
                if tried == self._restarts:
                    raise EngineError(f"{error}\n(started again {tried} times; teacher.restarts)") from None
                tried, self.count = tried + 1, self.count + 1
                what = str(error).partition("\n")[0]
                self._tell(f"{what}; starting it again, {tried} of {self._restarts} (log: {self.engine.log})")

    def end(self) -> None:
        """From now on a dead engine stays dead."""
        self._ended = True
