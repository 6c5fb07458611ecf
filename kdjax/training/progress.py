"""What a person sees of a run: start-up stages with their seconds, a bar, lines of metrics, tables.

In a terminal the bar is alive; elsewhere the same lines are printed plainly, so that logs stay readable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Display:
    """Prints to standard output, a terminal or a log; one a run."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stdout, quiet=quiet, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: Any = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show ``name`` while it runs and its seconds when it is done."""
        start = time.perf_counter()
        if self.console.is_terminal and self._progress is None:
            with self.console.status(name):
                yield
        else:
            yield
        self.line(f"{name:<34} {time.perf_counter() - start:6.1f} s")

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

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left", header_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
