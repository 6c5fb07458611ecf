"""An algorithm of one's own: divergence plus features, through a projection that is trained with the student.

python -m kdjax.train --config configs/quickstart.yaml output=runs/features \
    distill.algorithm=examples/own_algorithm.py:WithFeatures
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.algorithms import Frozen, Term
from kdjax.losses import linear_divergence


class WithFeatures(nnx.Module):
    """KL divergence, and a tenth of the cosine distance between the student's projected states and the teacher's."""

    def __init__(self, student, teachers, config, *, rngs):
        self.head = Frozen(teachers[0].head)
        width = student.config.hidden_size
        self.projection = nnx.Param(jax.random.normal(rngs.params(), (width, teachers[0].hidden_size)) * width**-0.5)

    def __call__(self, student, batch):
        hidden = batch.gather(student(batch.tokens, batch.positions, batch.segment_ids))  # [N, D]
        teacher = batch.teacher_hidden[0]  # [N, E]
        kd, count = linear_divergence(hidden, student.head(), teacher, self.head.get_value(), mask=batch.mask)
        ours = hidden @ self.projection[...]
        norms = jnp.linalg.norm(ours, axis=-1) * jnp.linalg.norm(teacher, axis=-1)
        distance = 1 - (ours * teacher).sum(-1) / jnp.maximum(norms, 1e-6)
        return {"kd": Term(kd, count), "feature": Term(jnp.where(batch.mask, distance, 0.0).sum(), count, 0.1)}
