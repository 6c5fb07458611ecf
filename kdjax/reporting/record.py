"""A run read back from its folder, whether it finished, goes on, or was interrupted and resumed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kdjax.config import reference
from kdjax.errors import UserError
from kdjax.progress import NOT_PARTS
from kdjax.training.about import read_about
from kdjax.training.metrics import FILE, read_metrics

Series = tuple[list[int], list[float]]
STEP_PARTS = ("student", "waiting", "transfer", "sync")
"""What a step's seconds are made of, as ``seconds/NAME``; `sync` only where weights go to engines."""


@dataclass(frozen=True)
class RunRecord:
    """``config`` as in config.yaml, ``about`` as in run.json, ``records`` as in metrics.jsonl."""

    folder: Path
    config: dict[str, Any]
    about: dict[str, Any]
    records: Sequence[dict[str, float]]

    @classmethod
    def load(cls, folder: str | Path) -> RunRecord:
        """Read the run folder ``folder``. Raises UserError when it is none, or a run that has recorded nothing."""
        folder = Path(folder)
        config = folder / "config.yaml"
        if not config.is_file():
            raise UserError(f"{folder}: no run is there (no config.yaml); give the `output` folder of a run")
        records = read_metrics(folder / FILE)
        if not records:
            raise UserError(f"{folder}: the run has recorded nothing yet; wait for its first evaluation or log line")
        return cls(folder, yaml.safe_load(config.read_text(encoding="utf-8")), read_about(folder), records)

    def series(self, name: str) -> Series:
        """Steps and values of what was recorded as ``name``."""
        known = [(int(record["step"]), record[name]) for record in self.records if name in record]
        return [step for step, _ in known], [value for _, value in known]

    @cached_property
    def parts(self) -> list[str]:
        """The training loss and its named parts, without those that only repeat it."""
        names = {name: None for record in self.training for name in record if "/" not in name}
        loss = self.series("loss")
        others = [n for n in names if n not in NOT_PARTS | {"step", "time"} and self.series(n) != loss]
        return ["loss", *others]

    @cached_property
    def training(self) -> list[dict[str, float]]:
        """The records of training steps."""
        return [record for record in self.records if "loss" in record]

    @cached_property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Step → held-out numbers."""
        found: dict[int, dict[str, float]] = {}
        for record in self.records:
            values = {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}
            if values:
                found[int(record["step"])] = values
        return dict(sorted(found.items()))

    @property
    def last_step(self) -> int:
        return int(max(record["step"] for record in self.records))

    @property
    def kept_step(self) -> int:
        """The step whose weights are the result: the exported one, else the last."""
        return self.about.get("kept_step", self.last_step)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Where the wall time went, largest first: what the steps waited for, and the stages around them."""
        spent: dict[str, float] = defaultdict(float)
        before = 0
        for record in self.training:
            steps, before = int(record["step"]) - before, int(record["step"])
            for name in STEP_PARTS:
                if f"seconds/{name}" in record:
                    spent[f"steps: {name}"] += steps * record[f"seconds/{name}"]
        for record in self.records:
            for name, value in record.items():
                if name.startswith("stage/"):
                    spent[name.removeprefix("stage/")] += value
        return dict(sorted(spent.items(), key=lambda item: -item[1]))

    @cached_property
    def changed(self) -> list[tuple[str, Any]]:
        """The keys of the configuration that are not at their defaults."""
        defaults = {name: default for name, _, default, _ in reference()}

        def walk(values: dict[str, Any], prefix: str = ""):
            for key, value in values.items():
                name = f"{prefix}{key}"
                if isinstance(value, dict) and name not in defaults:
                    yield from walk(value, f"{name}.")
                elif _plain(value) != _plain(defaults.get(name)):
                    yield name, trimmed(name, value)

        def trimmed(name: str, value: Any) -> Any:
            if not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
                return value
            return [{k: v for k, v in entry.items() if v != defaults.get(f"{name}[].{k}")} for entry in value]

        return list(walk(self.config))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
