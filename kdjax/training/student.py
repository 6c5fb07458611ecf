"""The student that a configuration describes, on the mesh."""

from __future__ import annotations

from flax import nnx
from jax.sharding import Mesh

from kdjax.config import Config
from kdjax.models import load_model
from kdjax.sharding import Rules


def make_student(config: Config, mesh: Mesh | None = None, rules: Rules = Rules()) -> nnx.Module:
    """Load, draw, or cut out of the teacher the model that ``config.student`` asks for.

    Raises UserError as ``load_model`` does.
    """
    student = config.student
    return load_model(
        config.teacher.path if student.init == "layers" and student.path is None else student.path,
        mesh=mesh,
        rules=rules,
        dtype=student.dtype,
        param_dtype=student.param_dtype,
        init=student.layers if student.init == "layers" else student.init,
        seed=config.train.seed,
        config=student.config,
        remat=student.remat,
        attention=student.attention,
        unroll=not student.scan_layers,
    )
