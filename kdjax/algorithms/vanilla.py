"""Logit distillation on a shared vocabulary, and supervised fine-tuning as the same thing without a teacher."""

from __future__ import annotations

from flax import nnx

from kdjax.algorithms.base import Frozen, Teacher, Term, objective_options, register_algorithm
from kdjax.config import Config
from kdjax.data.batch import Batch
from kdjax.losses import linear_objective


@register_algorithm("vanilla")
class Vanilla(nnx.Module):
    """(1 − kd_ratio) · cross-entropy + kd_ratio · divergence of student and teacher (Hinton et al., 1503.02531).

    Both logits are recomputed from hidden rows, chunk by chunk, so none of size [batch, V] ever exists.
    """

    def __init__(self, student: nnx.Module, teachers: tuple[Teacher, ...], config: Config, *, rngs: nnx.Rngs) -> None:
        self.head = Frozen(teachers[0].head)
        self.options = nnx.static(objective_options(config))

    def __call__(self, student: nnx.Module, batch: Batch) -> dict[str, Term]:
        hidden = batch.gather(student(batch.tokens, batch.positions, batch.segment_ids))
        total, count, parts = linear_objective(
            hidden,
            student.head(),
            batch.teacher_hidden[0],
            self.head.get_value(),
            labels=batch.labels,
            mask=batch.mask,
            **self.options,
        )
        return {"loss": Term(total, count)} | {name: Term(part, count, 0.0) for name, part in parts.items()}


@register_algorithm("sft")
class SFT(nnx.Module):
    """Cross-entropy on the tokens that carry loss."""

    def __init__(self, student: nnx.Module, teachers: tuple[Teacher, ...], config: Config, *, rngs: nnx.Rngs) -> None:
        pass

    def __call__(self, student: nnx.Module, batch: Batch) -> dict[str, Term]:
        hidden = batch.gather(student(batch.tokens, batch.positions, batch.segment_ids))
        total, count, _ = linear_objective(
            hidden, student.head(), None, None, labels=batch.labels, mask=batch.mask, kd_ratio=0.0
        )
        return {"ce": Term(total, count)}
