"""Learning from what the student wrote itself: the terms that rollouts share, and losses of the sampled token alone."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from kdjax.algorithms.base import Frozen, Teacher, Term, register_algorithm
from kdjax.config import Config
from kdjax.data.batch import Batch
from kdjax.errors import UserError
from kdjax.head import Head
from kdjax.losses import linear_rows
from kdjax.losses.rollouts import PolicyGradient, RolloutValues, Sampled

SIGNALS = ("advantage", "k2", "k3")


def sampled_as(config: Config) -> Sampled:
    """How a run's rollouts are drawn, for the functions of ``kdjax.losses.rollouts``."""
    return Sampled(config.rollout.temperature, config.rollout.importance_clip)


def rollout_terms(values: RolloutValues, student: nnx.Module, batch: Batch, head: Head) -> dict[str, Term]:
    """The terms of a batch that holds rollouts: ``values`` summed as the loss, and what is watched of the student.

    Every run with rollouts must report ``rollout/k3``: an algorithm of one's own may build its terms from these. The
    loss is divided by all rows, ``rollout/…`` by those of rollouts, ``ce`` by those of the data.
    """
    on = batch.extras["on_policy"] * batch.mask
    total, by_row = linear_rows(
        values,
        batch.gather(student(batch.tokens, batch.positions, batch.segment_ids)),
        student.head(),
        batch.teacher_hidden[0],
        head,
        rows={**batch.extras, "labels": batch.labels},
        mask=batch.mask,
    )
    count, sampled = batch.mask.sum(dtype=jnp.float32), on.sum()

    def watched(name: str) -> Term:
        return Term((by_row[name] * on).sum(), sampled, 0.0)

    terms = {
        "loss": Term(total, count),
        "kd": Term(by_row["kd"].sum(), count, 0.0),
        "rollout/k3": watched("k3"),
        "rollout/kl": watched("log_ratio")._replace(rows=by_row["log_ratio"]),
        "rollout/entropy": watched("entropy"),
        "rollout/overlap": watched("overlap"),
    }
    if values.sampled.clip is not None:
        terms["rollout/weight"] = watched("weight")
    if values.kd_ratio < 1:
        terms["ce"] = Term((by_row["ce"] * (1 - on)).sum(), count - sampled, 0.0)
    return terms


@register_algorithm("policy_gradient")
class PolicyGradientAlgorithm(nnx.Module):
    """Reverse or forward KL from the sampled tokens alone, with a task reward if there is one.

    ``distill.algorithm_args``: ``signal``, one of ``advantage`` (default), ``k2`` and ``k3``; see
    ``kdjax.losses.rollouts.PolicyGradient`` for what each is. Rows of the data carry (1 − kd_ratio) · cross-entropy.

    Raises UserError for the signal k1, for rollouts drawn from less than the whole softmax, and without rollouts.
    """

    arguments = ("signal",)

    def __init__(self, student: nnx.Module, teachers: tuple[Teacher, ...], config: Config, *, rngs: nnx.Rngs) -> None:
        signal = config.distill.algorithm_args.get("signal", "advantage")
        _check(config, signal)
        self.head = Frozen(teachers[0].head)
        self.values = nnx.static(PolicyGradient(signal, config.distill.kd_ratio, sampled_as(config)))

    def __call__(self, student: nnx.Module, batch: Batch) -> dict[str, Term]:
        return rollout_terms(self.values, student, batch, self.head.get_value())


def _check(config: Config, signal: str) -> None:
    if signal == "k1":
        raise UserError(
            "distill.algorithm_args.signal=k1: as a loss −log r has an expected gradient of zero, it would teach "
            "nothing; for reverse KL use signal=advantage, which is −k1 as a reward, or k2"
        )
    if signal not in SIGNALS:
        raise UserError(f"distill.algorithm_args.signal={signal}: policy_gradient knows {', '.join(SIGNALS)}")
    if not config.distill.on_policy_fraction:
        raise UserError("distill.algorithm=policy_gradient needs rollouts: set distill.on_policy_fraction above 0")
    if config.distill.on_policy_fraction < 1 and config.distill.kd_ratio == 1:
        raise UserError(
            "distill.algorithm=policy_gradient with kd_ratio=1 would learn nothing from the rows of the data that "
            "on_policy_fraction mixes in: they carry (1 - kd_ratio) of cross-entropy alone; lower distill.kd_ratio, or "
            "set distill.on_policy_fraction=1"
        )
    rollout = config.rollout
    if rollout.top_p < 1 or rollout.top_k:
        raise UserError(
            f"distill.algorithm=policy_gradient with rollout.top_p={rollout.top_p}, top_k={rollout.top_k}: tokens of a "
            f"cut-off distribution make its gradient that of something else, and engines report probabilities before "
            f"the cut, so weights cannot mend it; set top_p=1 and top_k=0, or use algorithm=vanilla"
        )
    if config.distill.temperature != rollout.temperature:
        raise UserError(
            f"distill.algorithm=policy_gradient compares at the sampling temperature: set distill.temperature="
            f"{rollout.temperature} (it is {config.distill.temperature}), or change rollout.temperature"
        )
