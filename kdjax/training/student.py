"""The student that a configuration describes, on the mesh."""

from __future__ import annotations

from flax import nnx
from jax.sharding import Mesh

from kdjax.config import Config
from kdjax.models import Compute, ModelConfig, init_model, load_model
from kdjax.sharding import Rules


def make_student(config: Config, mesh: Mesh, rules: Rules = Rules()) -> nnx.Module:
    """Load, draw, or cut out of the teacher the model that ``config.student`` asks for."""
    student = config.student
    compute = dict(dtype=student.dtype, param_dtype=student.param_dtype, remat=student.remat, attention=student.attention)
    if student.path is None and student.init == "random":
        shape = ModelConfig.from_hf(student.config, "student.config")
        return init_model(shape, Compute(**compute, rules=rules), mesh, config.train.seed)
    return load_model(
        student.path or config.teacher.path,
        mesh=mesh,
        rules=rules,
        init=student.layers if student.init == "layers" else student.init,
        overrides=student.config,
        seed=config.train.seed,
        **compute,
    )
