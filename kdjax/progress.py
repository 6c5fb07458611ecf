"""What a person sees of a run: start-up stages with their seconds, a bar, lines of metrics, tables.

In a terminal the bar is alive; elsewhere the same lines are printed plainly, so that logs stay readable.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

NOT_PARTS = {"loss", "grad_norm", "loss_tokens", "learning_rate", "tokens_per_second"}
"""Numbers of a training record that are no part of the loss; those with a slash are none either."""


class Display:
    """Prints to standard output, a terminal or a log; one a run."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stdout, quiet=quiet, highlight=False, soft_wrap=True, emoji=False)
        self._seconds: dict[str, float] = defaultdict(float)
        self._progress: Progress | None = None
        self._task: Any = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show ``name`` while it runs and its seconds when it is done."""
        with self.timed(name) as start:
            if self.console.is_terminal and self._progress is None:
                with self.console.status(name):
                    yield
            else:
                yield
        self.line(f"{name:<34} {time.perf_counter() - start:6.1f} s")

    @contextmanager
    def timed(self, name: str) -> Iterator[float]:
        """Count the seconds of a stage without showing it; gives the time at which it started."""
        start = time.perf_counter()
        yield start
        self._seconds[name] += time.perf_counter() - start

    def spent(self) -> dict[str, float]:
        """``stage/NAME``: the seconds of the stages since this was last asked."""
        seconds = {f"stage/{name}": value for name, value in self._seconds.items()}
        self._seconds.clear()
        return seconds

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, total: int, done: int = 0) -> Iterator[None]:
        """A progress bar over ``total`` steps, for a terminal only."""
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            self._task = self._progress.add_task("training", total=total, completed=done)
            yield
        self._progress = None

    def advance(self, step: int, loss: float) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=f"loss {loss:.4f}")

    def step(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """A line of training: loss and its parts, rates, time left, and where the seconds of a step went."""
        parts = {name: value for name, value in values.items() if name not in NOT_PARTS and "/" not in name}
        words = [f"step {step}/{steps}", f"loss {values['loss']:.4f}", *(f"{n} {v:.4f}" for n, v in parts.items())]
        if "rollout/k3" in values:
            words.append(f"k3 {values['rollout/k3']:.1e}")
        words += [f"grad {values['grad_norm']:.2f}", f"lr {values['learning_rate']:.1e}"]
        if "tokens_per_second" in values:
            words.append(f"{values['tokens_per_second']:,.0f} tok/s")
        seconds = {n.removeprefix("seconds/"): v for n, v in values.items() if n.startswith("seconds/")}
        whole = seconds.pop("step")
        beside = {name: f"{seconds.pop(name):.2f}" for name in ("generate", "teacher") if name in seconds}
        if "rollout/hidden" in values:
            beside["generate"] += f", {values['rollout/hidden']:.0%} hidden"
        shares = " + ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        others = "".join(f"; {name} {text}" for name, text in beside.items())
        words.append(f"{whole:.2f} s/step ({shares}{others})")
        words.append(f"eta {timedelta(seconds=round(whole * (steps - step)))}")
        self.line("  ".join(words))

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left", header_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
