"""A thread that works ahead of who takes its results, by a bounded number of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")
POLL_SECONDS = 0.2  # between looks at whether a wait is still wanted


class Ahead(Generic[Result]):
    """Runs ``produce`` in a thread, at most ``depth`` results ahead of ``take``; its errors surface in ``take``.

    With depth 0 the thread produces only while ``take`` waits.
    """

    def __init__(self, produce: Callable[[], Result], depth: int) -> None:
        self._produce, self._on_demand = produce, depth == 0
        self._results: queue.Queue = queue.Queue()
        self._permits = threading.Semaphore(depth)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kdjax-ahead", daemon=True)
        self._thread.start()

    def take(self, give_up: Callable[[], object]) -> Result | None:
        """The next result, or None once ``give_up()`` is true."""
        if self._on_demand:
            self._permits.release()
        while True:
            try:
                result, error = self._results.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if give_up():
                    return None
        if error is not None:
            self._results.put((None, error))
            raise error
        if not self._on_demand:
            self._permits.release()
        return result

    def stop(self) -> None:
        """Produce no more; a result that is being made is finished."""
        self._stopping = True
        self._permits.release()

    def join(self) -> None:
        """``stop``, and wait until nothing is being made."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._permits.acquire()
            if self._stopping:
                return
            try:
                self._results.put((self._produce(), None))
            except BaseException as error:  # raised again in the thread that takes
                self._results.put((None, error))
                return
