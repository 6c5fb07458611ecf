"""The student that a configuration describes, on the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.folders import resolve
from kdjax.models import ModelConfig, export_hf, load_model
from kdjax.sharding import Rules


def student_shape(config: Config) -> ModelConfig:
    """The student's numbers, read from its configuration alone.

    Raises UserError where there is none, or where it has too few positions for ``data.max_len``.
    """
    path, changes = _path(config), dict(config.student.config)
    if path is None:
        shape = ModelConfig.from_hf(changes, "student.config")
    else:
        shape = ModelConfig.from_folder(resolve(path, weights=False), **changes)
    if config.data.max_len > shape.max_position_embeddings:
        raise UserError(
            f"data.max_len={config.data.max_len} is beyond the student's {shape.max_position_embeddings} positions; "
            f"lower it, or with student.init=random raise student.config.max_position_embeddings"
        )
    return shape


def tokenizer_path(config: Config) -> str:
    """Whose tokenizer and chat template the student is trained and exported with.

    A student that brings its embedding along keeps its own, so that it is really compared with the teacher's; any other
    takes the teacher's.
    """
    student = config.student.path if config.student.init != "random" else None
    return config.data.tokenizer or student or config.teacher.path or config.student.path


def make_student(
    config: Config, mesh: Mesh | None = None, rules: Rules = Rules(), *, abstract: bool = False
) -> nnx.Module:
    """Load, draw, or cut out of the teacher the model that ``config.student`` asks for.

    ``abstract`` makes shapes and shardings only, to be filled from a checkpoint.
    Raises UserError as ``load_model`` does.
    """
    student = config.student
    return load_model(
        _path(config),
        mesh=mesh,
        rules=rules,
        abstract=abstract,
        dtype=student.dtype,
        param_dtype=student.param_dtype,
        init=student.layers if student.init == "layers" else student.init,
        seed=config.train.seed,
        config=student.config,
        remat=student.remat,
        attention=student.attention,
        unroll=not student.scan_layers,
    )


def export_student(
    model: nnx.Module,
    config: Config,
    out: str | Path,
    dtype: str | None = None,
    *,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` as the Hugging Face folder that a run of ``config`` exports; returns the folder.

    ``dtype`` of the stored weights; None takes ``student.export_dtype``. ``about`` and what is raised: see
    ``export_hf``.
    """
    return export_hf(
        model,
        out,
        source=config.student.path or config.teacher.path,
        tokenizer=tokenizer_path(config),
        dtype=dtype or config.student.export_dtype,
        stop_ids=config.rollout.stop_ids,
        entries={k: v for k, v in config.student.config.items() if k.endswith("_token_id")},
        about=about,
    )


def _path(config: Config) -> str | None:
    student = config.student
    if student.path is None and student.init != "layers" and not student.config:
        raise UserError("student.path is missing: a Hugging Face folder or hub id")
    return config.teacher.path if student.init == "layers" and student.path is None else student.path
