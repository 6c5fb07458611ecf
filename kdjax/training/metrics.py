"""Where numbers go: a JSON line a record, and tensorboard events."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Metrics:
    """Writes records of ``{name: number}`` by step to ``metrics.jsonl`` and, if asked, tensorboard event files."""

    def __init__(self, folder: Path, tensorboard: bool = True, resumed_at: int = 0) -> None:
        path = folder / "metrics.jsonl"
        kept = []
        if resumed_at and path.exists():  # what the interrupted run wrote after its last checkpoint will come again
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= resumed_at]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._events = None
        if tensorboard:
            # Imports torch where it is installed: in a run only, never by `import kdjax`.
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record scalars of ``step``; names with a slash are grouped by what stands before it."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: number if math.isfinite(number) else str(number) for name, number in numbers.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        if self._events is not None:
            for name, number in numbers.items():
                self._events.add_scalar(name, number, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
