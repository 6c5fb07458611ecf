"""What goes into a line of metrics beside the step's own numbers: rates, and where the seconds of a step went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from kdjax.config import Config
from kdjax.training.device_batch import DeviceBatch
from kdjax.training.optimizer import make_schedule


class Window:
    """What happened since the last line of metrics: tokens and seconds, evaluation and saving not counted."""

    LOOPS = ("waiting", "transfer", "sync")
    """What the loop itself does to have a batch: seconds of the window in which it is taken, one before its step is
    done. All others passed alongside and are told with the step."""

    def __init__(self, config: Config, steps: int, done: int) -> None:
        self._schedule = make_schedule(config.train, steps)
        self._seconds: dict[str, float] = {"waiting": 0.0, "transfer": 0.0}
        self._start(done)

    def _start(self, step: int) -> None:
        self._first, self._tokens, self._took, self._since = step, 0, 0, time.perf_counter()
        # What the loop does is told in every window once it was seen, where it took no time too.
        self._seconds = defaultdict(float, {name: 0.0 for name in self.LOOPS if name in self._seconds})

    def took(self, batch: DeviceBatch) -> None:
        """A batch was waited for and placed."""
        self._took += 1
        for name in batch.seconds.keys() & set(self.LOOPS):
            self._seconds[name] += batch.seconds[name]

    def done(self, batch: DeviceBatch) -> None:
        """Its step is done."""
        self._tokens += batch.host.tokens
        for name in batch.seconds.keys() - set(self.LOOPS):
            self._seconds[name] += batch.seconds[name]

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def close(self, step: int) -> dict[str, float]:
        """Learning rate of ``step``, tokens/s, and seconds a step by what they went into; starts the next window.

        The window that ends a run has taken a batch less than it has steps, as the first was taken before there were
        windows; so what a batch costs is divided by the batches, and a step is what both come to. Where no batch was
        taken there is no speed.
        ``rollout/hidden`` is the share of the seconds of generation in which the loop had something else to do.
        """
        steps, wall = step - self._first, time.perf_counter() - self._since
        values = {"learning_rate": float(self._schedule(step - 1))}
        of_loop = {name: self._seconds[name] for name in self.LOOPS if name in self._seconds}
        # What neither weights on their way, the wait for a batch nor its placing took, the loop spent on the student.
        seconds = {"student": max(0.0, wall - sum(of_loop.values())) / steps}
        seconds |= {name: value / max(self._took, 1) for name, value in of_loop.items()}
        seconds["step"] = sum(seconds.values())
        seconds |= {name: value / steps for name, value in self._seconds.items() if name not in of_loop}
        if self._took:
            values["tokens_per_second"] = self._tokens / steps / seconds["step"]
        if "generate" in seconds:
            values["rollout/hidden"] = seconds.pop("hidden") / seconds["generate"]
        self._start(step)
        return values | {f"seconds/{name}": value for name, value in seconds.items()}
