"""A trace of a few steps, for the question where a step's time goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

WARM_UP = 3  # steps before the first traced one: they compile, and fill what runs ahead


class Profiler:
    """Writes ``jax.profiler``'s trace of ``steps`` of a run's steps into ``folder``; with 0 steps it does nothing.

    ``WARM_UP`` steps after ``done``, those that an earlier life of the run has made, pass first; fewer where the run is
    too short for them. The traced steps are named ``step N``, and ``doing`` names what the loop does meanwhile.
    """

    def __init__(self, folder: Path, steps: int, done: int, last: int, tell: Callable[[str], None]) -> None:
        self.first = max(done + 2, min(done + 1 + WARM_UP, last - steps + 1))
        self.last = min(last, self.first + steps - 1)
        self._folder, self._tell = folder, tell
        self._tracing, self._newest = False, 0
        if steps and self.first > last:
            tell("log.profile: no step is left to trace; the first of a run compiles")

    def step(self, number: int) -> AbstractContextManager[Any]:
        """Around the dispatch of step ``number``."""
        if number == self.first <= self.last:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would slow the steps down and swamp the trace
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._tracing = True
        self._newest = number
        return jax.profiler.StepTraceAnnotation("step", step_num=number)

    def done(self, number: int) -> None:
        """Step ``number`` has left its numbers on the host."""
        if self._tracing and number >= self.last:
            self.close()

    def close(self) -> None:
        """End a trace that is being taken, also where the run stops or fails before its last step."""
        if not self._tracing:
            return
        self._tracing = False
        jax.profiler.stop_trace()
        trace = max(self._folder.glob("plugins/profile/*/*.trace.json.gz"), default=None)
        if trace is not None:
            last = min(self._newest, self.last)
            self._tell(f"trace of steps {self.first} to {last}: open {trace} at https://ui.perfetto.dev")

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def doing(what: str) -> AbstractContextManager[Any]:
    """Name in a trace what this thread does; costs nothing where none is taken."""
    return jax.profiler.TraceAnnotation(what)
