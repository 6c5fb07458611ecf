"""Feature distillation: an intermediate layer of the student is led to the teacher's hidden states."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.algorithms.base import Frozen, Teacher, Term, objective_options, register_algorithm
from kdjax.config import Config
from kdjax.data.batch import Batch
from kdjax.losses import linear_objective


@register_algorithm("feature")
class Feature(nnx.Module):
    """Logit distillation plus feature_weight · |u/‖u‖ − t/‖t‖|² per position (FitNets, 1412.6550, on unit vectors).

    u is the student's state after block ``feature_layer`` sent through a learnt [D, E] projection, t the teacher's
    hidden state after its final norm. The projection trains at ``train.extra_lr`` and is not exported.

    ``distill.algorithm_args``: ``feature_layer`` (default −1, the last block), ``feature_weight`` (default 1.0).
    """

    arguments = ("feature_layer", "feature_weight")
    rollouts = False

    def __init__(self, student: nnx.Module, teachers: tuple[Teacher, ...], config: Config, *, rngs: nnx.Rngs) -> None:
        given = config.distill.algorithm_args
        self.layer, self.weight = given.get("feature_layer", -1), given.get("feature_weight", 1.0)
        width = student.config.hidden_size
        draw = jax.random.normal(rngs.params(), (width, teachers[0].hidden_size)) * width**-0.5
        self.projection = nnx.Param(draw)
        self.head = Frozen(teachers[0].head)
        self.options = nnx.static(objective_options(config))

    def __call__(self, student: nnx.Module, batch: Batch) -> dict[str, Term]:
        last, (inner,) = student(batch.tokens, batch.positions, batch.segment_ids, hidden_layers=(self.layer,))
        teacher = batch.teacher_hidden[0]
        total, count, parts = linear_objective(
            batch.gather(last),
            student.head(),
            teacher,
            self.head.get_value(),
            labels=batch.labels,
            mask=batch.mask,
            **self.options,
        )
        ours = _unit(batch.gather(inner).astype(jnp.float32) @ self.projection[...])
        # Rows without loss may hold anything: they are left out before the sum, not multiplied by zero after it.
        theirs = _unit(jnp.where(batch.mask[:, None], teacher.astype(jnp.float32), 0.0))
        distance = jnp.where(batch.mask, jnp.square(ours - theirs).sum(-1), 0.0).sum()
        reports = {name: Term(part, count, 0.0) for name, part in parts.items()}
        return {"objective": Term(total, count), "feature": Term(distance, count, self.weight)} | reports


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)
