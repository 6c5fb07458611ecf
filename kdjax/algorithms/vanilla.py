"""Logit distillation on a shared vocabulary, and supervised fine-tuning as the same thing without a teacher."""

from __future__ import annotations

from flax import nnx

from kdjax.algorithms.base import Frozen, Teacher, Term, objective_options, register_algorithm
from kdjax.algorithms.policy_gradient import rollout_terms, sampled_as
from kdjax.config import Config
from kdjax.data.batch import Batch
from kdjax.losses import find_divergence, linear_objective
from kdjax.losses.rollouts import DivergenceOnRollouts


@register_algorithm("vanilla")
class Vanilla(nnx.Module):
    """(1 − kd_ratio) · cross-entropy + kd_ratio · divergence of student and teacher (Hinton et al., 1503.02531).

    Both logits are recomputed from hidden rows, chunk by chunk, so none of size [batch, V] ever exists. Rows that the
    student wrote itself carry the divergence alone (GKD, 2306.13649).
    """

    arguments = ()

    def __init__(self, student: nnx.Module, teachers: tuple[Teacher, ...], config: Config, *, rngs: nnx.Rngs) -> None:
        self.head = Frozen(teachers[0].head)
        self.options = nnx.static(objective_options(config))
        self.on_rollouts = nnx.static(_on_rollouts(config) if config.distill.on_policy_fraction else None)

    def __call__(self, student: nnx.Module, batch: Batch) -> dict[str, Term]:
        if self.on_rollouts is not None:
            return rollout_terms(self.on_rollouts, student, batch, self.head.get_value())
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


def _on_rollouts(config: Config) -> DivergenceOnRollouts:
    distill = config.distill
    divergence = find_divergence(distill.loss)
    params = divergence.checked(distill.temperature, dict(distill.loss_args))
    return DivergenceOnRollouts(divergence, tuple(sorted(params.items())), distill.kd_ratio, sampled_as(config))


@register_algorithm("sft")
class SFT(nnx.Module):
    """Cross-entropy on the tokens that carry loss."""

    arguments = ()
    rollouts = False

    def __init__(self, student: nnx.Module, teachers: tuple[Teacher, ...], config: Config, *, rngs: nnx.Rngs) -> None:
        pass

    def __call__(self, student: nnx.Module, batch: Batch) -> dict[str, Term]:
        hidden = batch.gather(student(batch.tokens, batch.positions, batch.segment_ids))
        total, count, _ = linear_objective(
            hidden, student.head(), None, None, labels=batch.labels, mask=batch.mask, kd_ratio=0.0
        )
        return {"ce": Term(total, count)}
