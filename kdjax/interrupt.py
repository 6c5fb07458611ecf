"""Being asked to stop: SIGTERM and the first Ctrl-C save and leave; a second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal, which the message names, broke off what it came in. Like a Ctrl-C it is no ``Exception``."""


class Interrupt:
    """While entered, ``asked`` names the signal that asked to stop, or is None.

    What must come to its end looks at ``asked``; what need not runs in ``breakable``.

    Python runs signal handlers in the main thread, and not while that waits in compiled code. So a thread of its own
    reads which signals came (``signal.set_wakeup_fd``), and a second Ctrl-C ends the process even in a long step.

    Args:
        tell: takes the line that answers the first signal.
        at_once: is called before the process ends at the second Ctrl-C.
    """

    def __init__(self, tell: Callable[[str], None], at_once: Callable[[], None]) -> None:
        self.asked: str | None = None
        self._tell, self._at_once, self._breakable = tell, at_once, False
        self._before: dict[int, Any] = {}

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """The first signal breaks off what runs inside by Interrupted; one that came earlier, before it begins.

        It is raised once: what cleans up behind it is left in peace.
        """
        self._breakable = True
        try:
            self.leave()
            yield
            self.leave()  # Python drops what is raised in the middle of a finalizer
        finally:
            self._breakable = False

    def leave(self) -> None:
        """Raise Interrupted if a signal asked to stop."""
        if self.asked is not None:
            self._breakable = False
            raise Interrupted(self.asked)

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be caught
            come, self._go = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self._go, False)
            self._wakeup = signal.set_wakeup_fd(self._go, warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
            threading.Thread(target=self._watch, args=(come,), name="kdjax-signals", daemon=True).start()
        return self

    def _take(self, number: int, _: Any) -> None:
        self._note(number)
        if self._breakable:
            self.leave()

    def _note(self, number: int) -> None:
        self.asked = self.asked or signal.Signals(number).name

    def _watch(self, come: int) -> None:
        first = True
        with open(come, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] not in self._before:
                    continue
                if first:
                    self._note(number[0])
                    self._tell(f"{self.asked}: saving what there is, then leaving; Ctrl-C leaves at once")
                elif number[0] == signal.SIGINT:
                    self._at_once()
                    sys.stdout.flush()
                    os._exit(130)
                first = False

    def __exit__(self, *_: Any) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._go)
