"""An algorithm of one's own for rollouts: each kind of row its own divergence, and the task reward if there is one.

python -m kdjax.train --config configs/on_policy.yaml output=runs/by_kind \\
    distill.algorithm=examples/own_rollout_algorithm.py:ByKind
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax

from kdjax.algorithms import Frozen, rollout_terms, sampled_as
from kdjax.losses import ce, kl, rkl
from kdjax.losses.linear import common_ids
from kdjax.losses.rollouts import WATCHED, Sampled


@dataclass(frozen=True)
class KindValues:
    """Reverse KL where the student wrote, forward KL and cross-entropy where the data did."""

    kd_ratio: float
    sampled: Sampled
    names: ClassVar[tuple[str, ...]] = ("loss", "kd", "ce", *WATCHED)

    def __call__(self, student, teacher, rows, keep, vocab):  # float32 [rows, V] twice -> arrays [rows]
        on, labels = rows["on_policy"], rows["labels"]
        q, p = common_ids(student, teacher, keep)
        kd = jnp.where(on > 0, rkl(q, p, vocab=vocab), kl(q, p, vocab=vocab))
        nll = ce(student, labels, vocab=vocab)
        reward = rows.get("advantage", 0.0) * self.sampled.log_q(student, labels, vocab)
        watched = self.sampled.watch(student, teacher, rows, keep, vocab)  # without gradient; the last is the weight
        loss = self.kd_ratio * watched[-1] * (kd - on * reward) + (1 - self.kd_ratio) * (1 - on) * nll
        return loss, *lax.stop_gradient((kd, nll)), *watched


class ByKind(nnx.Module):
    def __init__(self, student, teachers, config, *, rngs):
        self.head = Frozen(teachers[0].head)
        self.values = nnx.static(KindValues(config.distill.kd_ratio, sampled_as(config)))

    def __call__(self, student, batch):
        return rollout_terms(self.values, student, batch, self.head.get_value())
