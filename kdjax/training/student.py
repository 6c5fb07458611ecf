"""The student that a configuration describes, on the mesh."""

from __future__ import annotations

from flax import nnx
from jax.sharding import Mesh

from kdjax.config import Config
from kdjax.models import load_model
from kdjax.sharding import Rules


def make_student(config: Config, mesh: Mesh, rules: Rules = Rules()) -> nnx.Module:
    """Load, draw, or cut out of the teacher the model that ``config.student`` asks for."""
    student = config.student
    return load_model(
        student.path or config.teacher.path,
        mesh=mesh,
        rules=rules,
        dtype=student.dtype,
        param_dtype=student.param_dtype,
        init=student.init if student.init != "layers" else tuple(student.layers),
        config=student.config,
        remat=student.remat,
        attention=student.attention,
        seed=config.train.seed,
    )
