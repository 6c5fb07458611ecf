"""Being asked to stop: SIGTERM and the first Ctrl-C finish the step and save; a second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any


class Interrupt:
    """While entered, ``asked`` names the signal that asked the run to stop, or is None.

    Python runs signal handlers in the main thread, and not while that waits in compiled code. So a thread of its own
    reads which signals came (``signal.set_wakeup_fd``), and a second Ctrl-C ends the process even in a long step.

    Args:
        tell: takes the line that answers the first signal.
        at_once: is called before the process ends at the second Ctrl-C.
    """

    def __init__(self, tell: Callable[[str], None], at_once: Callable[[], None]) -> None:
        self.asked: str | None = None
        self._tell, self._at_once = tell, at_once
        self._before: dict[int, Any] = {}

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
        self.asked = self.asked or signal.Signals(number).name

    def _watch(self, come: int) -> None:
        first = True
        with open(come, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] not in self._before:
                    continue
                if first:
                    self._take(number[0], None)
                    self._tell(f"{self.asked}: finishing what is in hand, then saving; Ctrl-C leaves at once")
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
