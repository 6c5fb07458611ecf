"""An algorithm of one's own: logits and features, with a projection that is trained along with the student.

    python -m kdjax.train --config configs/quickstart.yaml distill.algorithm=examples/feature_algorithm.py:WithFeatures
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.algorithms import Frozen, Term
from kdjax.losses import linear_objective


class WithFeatures(nnx.Module):
    """Kullback–Leibler divergence plus the cosine distance of the student's projected states to the teacher's."""

    def __init__(self, student, teachers, config, *, rngs):
        self.head = Frozen(teachers[0].head)
        width = student.config.hidden_size
        self.projection = nnx.Param(jax.random.normal(rngs.params(), (width, teachers[0].hidden_size)) * width**-0.5)
        self.weight = config.distill.algorithm_args.get("feature_weight", 0.1)

    def __call__(self, student, batch):
        hidden = batch.gather(student(batch.tokens, batch.positions, batch.segment_ids))
        teacher = batch.teacher_hidden[0]
        kd, count, _ = linear_objective(
            hidden, student.head(), teacher, self.head.get_value(), labels=batch.labels, mask=batch.mask, kd_ratio=1.0
        )
        ours = hidden @ self.projection[...]
        norms = jnp.linalg.norm(ours, axis=-1) * jnp.linalg.norm(teacher, axis=-1)
        distance = 1 - (ours * teacher).sum(-1) / jnp.maximum(norms, 1e-6)
        feature = jnp.where(batch.mask, distance, 0.0).sum()
        return {"kd": Term(kd, count), "feature": Term(feature, count, self.weight)}
