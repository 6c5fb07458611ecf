"""The student of a run folder, as some step left it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from kdjax.config import Config, load_config
from kdjax.errors import UserError
from kdjax.models import load_model
from kdjax.sharding import make_mesh
from kdjax.training.best import BEST
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.student import make_student


def run_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run folder ``run``, with overrides. Raises UserError when it is none."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no run is there (no config.yaml); give the `output` folder of a run")
    return load_config(run / "config.yaml", overrides)


def load_saved(
    run: Path, config: Config, *, step: int | None = None, best: bool = False, mesh: Mesh | None = None
) -> nnx.Module:
    """The student of the newest checkpoint in ``run``, of that of ``step``, or of the best evaluation.

    Args:
        config: the run's own; its sizes decide what is read.
        best: take the weights that ``train.keep_best`` kept.
        mesh: where they go; by default one device.

    Raises UserError when there is no such checkpoint, with the steps that there are.
    """
    student = config.student
    if best:
        if not (run / BEST).is_dir():
            raise UserError(f"{run}: no best weights are there; the run was not asked to keep them (train.keep_best)")
        return load_model(run / BEST, mesh, dtype=student.dtype, param_dtype=student.param_dtype)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run}/checkpoints holds no checkpoint; train first, or set checkpoint.save_every")
    tell = partial(print, file=sys.stderr)
    with Checkpoints(run / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        known = checkpoints.steps
        if not known:
            raise UserError(f"{run}/checkpoints holds no checkpoint; train first, or set checkpoint.save_every")
        if step is not None and step not in known:
            raise UserError(f"{run}: no checkpoint of step {step}; there are {', '.join(map(str, known))}")
        model = make_student(config, mesh, abstract=True)
        nnx.update(model, checkpoints.restore_student(nnx.state(model, nnx.Param), tell, step))
    return model
