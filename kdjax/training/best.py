"""The weights of the best evaluation so far: a folder that says itself which step they are of and what was measured.

It is replaced at once, while a checkpoint knows evaluations up to its own step only. So after a kill the folder may be
ahead of the checkpoint that the run goes on from, and what it says of itself is what counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from kdjax.config import Config
from kdjax.models import ABOUT
from kdjax.training.student import export_student

BEST = "best"  # in the folder of a run


class Best(NamedTuple):
    step: int
    values: dict[str, float]
    """Of its evaluation."""


def write_best(run: Path, model: nnx.Module, config: Config, best: Best) -> None:
    """Replace the best weights of the run folder ``run``, whole or not at all, in the parameters' own dtype."""
    export_student(model, config, run / BEST, config.student.param_dtype, about=best._asdict())


def read_best(run: Path) -> Best | None:
    """Whose weights are there; None where there are none, or none that say it."""
    file = run / BEST / ABOUT
    return Best(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
