"""What a row of a rollout is worth: functions of both logits and of how the row was sampled, for ``linear_rows``.

q is the student and p the teacher. A rollout row's label y was sampled from the engine's q at the sampling temperature;
the log-probability that the engine gave it comes along. A dataset row's label was not, so it carries cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kdjax.losses.divergences import ce
from kdjax.losses.linear import common_ids
from kdjax.losses.registry import Divergence
from kdjax.losses.vocab import Vocab

OVERLAP = 5
WATCHED = ("k3", "log_ratio", "entropy", "overlap", "weight")


@dataclass(frozen=True)
class Sampled:
    """How rollouts were drawn, and what is watched of them."""

    temperature: float = 1.0
    """Of the sampling."""
    clip: float | None = None
    """Importance weights q / engine, cut off at this number (truncated importance sampling); None: no weights."""

    def log_q(self, logits: Float[Array, "rows V"], labels: Array, vocab: Vocab) -> Float[Array, " rows"]:
        """log-probability of the labels at the sampling temperature, over the model's whole softmax."""
        return -vocab.nll(logits / self.temperature, labels)

    def watch(self, student: Array, teacher: Array, rows: dict[str, Array], keep: Array | None, vocab: Vocab) -> Any:
        """The values ``WATCHED``, without gradient.

        ``k3``: r − 1 − log r with r = trainer / engine probability of the label (Schulman's estimator of their KL, at
        least 0); ``log_ratio``: log q − log p, whose mean over rollouts is the reverse KL; ``entropy`` of q;
        ``overlap``: share of the teacher's five likeliest ids among the student's; ``weight``: the importance weight.
        """
        student, teacher = lax.stop_gradient((student, teacher))
        on, labels = rows["on_policy"] > 0, rows["labels"]
        log_q, log_p = (self.log_q(logits, labels, vocab) for logits in (student, teacher))
        gap = jnp.where(on, log_q - rows["behaviour_logprobs"], 0.0)
        log_soft = vocab.log_softmax(student / self.temperature)
        entropy = -vocab.sum(jnp.exp(log_soft) * log_soft)
        ours, theirs = (vocab.top_k(logits, OVERLAP) for logits in common_ids(student, teacher, keep))
        overlap = (ours[..., :, None] == theirs[..., None, :]).any(-1).mean(-1)
        weight = jnp.ones_like(gap) if self.clip is None else jnp.minimum(jnp.exp(gap), self.clip)
        return jnp.exp(gap) - 1 - gap, jnp.where(on, log_q - log_p, 0.0), entropy, overlap, weight


@runtime_checkable
class RolloutValues(Protocol):
    """What a row is worth and what is watched of it: for ``linear_rows`` and ``kdjax.algorithms.rollout_terms``.

    Hashable, since it is a static part of the compiled step: a frozen dataclass.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Of the values in their order: ``loss`` first, then at least ``kd``, ``ce`` and ``WATCHED``."""
        ...

    @property
    def kd_ratio(self) -> float:
        """Below 1 the cross-entropy of dataset rows is reported."""
        ...

    @property
    def sampled(self) -> Sampled:
        """With a ``clip`` the importance weights are reported."""
        ...

    def __call__(
        self,
        student: Float[Array, "rows V"],
        teacher: Float[Array, "rows W"],
        rows: dict[str, Array],
        keep: Bool[Array, " C"] | None,
        vocab: Vocab,
    ) -> tuple[Float[Array, " rows"], ...]:
        """The values of a block of rows, float32 [rows] each; all but the loss without gradient.

        Args:
            student, teacher: float32 logits; of a vocabulary that is split over devices the columns of this one, which
                only the reductions of ``vocab`` may add up.
            rows: what is known of each row, [rows] each: ``labels`` (int32), ``on_policy`` (1 where the label was
                sampled, 0 for a row of the data), ``behaviour_logprobs`` (of the label, by the engine that sampled it)
                and, in a run with a reward, ``advantage``. The float32 ones are 0 in rows of the data.
            keep: which of the first C = min(V, W) ids both sides know; None: all. See ``common_ids``.

        Rows outside the batch's mask are left out afterwards, whatever their values.
        """
        ...


@dataclass(frozen=True)
class DivergenceOnRollouts:
    """kd_ratio · divergence on every row, and (1 − kd_ratio) · cross-entropy on dataset rows."""

    divergence: Divergence
    params: tuple[tuple[str, Any], ...]
    kd_ratio: float
    sampled: Sampled
    names: ClassVar[tuple[str, ...]] = ("loss", "kd", "ce", *WATCHED)

    def __call__(self, student, teacher, rows, keep, vocab: Vocab) -> tuple[Array, ...]:
        kd = self.divergence(*common_ids(student, teacher, keep), vocab=vocab, **dict(self.params))
        nll = ce(student, rows["labels"], vocab=vocab)
        watched = self.sampled.watch(student, teacher, rows, keep, vocab)
        loss = self.kd_ratio * watched[-1] * kd + (1 - self.kd_ratio) * (1 - rows["on_policy"]) * nll
        return loss, *lax.stop_gradient((kd, nll)), *watched


@dataclass(frozen=True)
class PolicyGradient:
    """kd_ratio · a loss of the sampled token on rollout rows, and (1 − kd_ratio) · cross-entropy on dataset rows.

    With r = p(y)/q(y) at the sampling temperature, w the importance weight and A the reward's advantage, if there is
    one (``rows["advantage"]``):

    ``advantage``: −w · (stop_gradient(log p − log q) + A) · log q, reverse KL as a per-token reward;
    ``k2``: w · ½ log² r − w · A · log q, whose expected slope is the reverse KL's too;
    ``k3``: w · (r − 1 − log r) − w · A · log q, whose expected slope is the forward KL's.
    """

    signal: Literal["advantage", "k2", "k3"]
    kd_ratio: float
    sampled: Sampled
    names: ClassVar[tuple[str, ...]] = ("loss", "kd", "ce", *WATCHED)

    def __call__(self, student, teacher, rows, keep, vocab: Vocab) -> tuple[Array, ...]:
        labels, on = rows["labels"], rows["on_policy"]
        watched = self.sampled.watch(student, teacher, rows, keep, vocab)
        log_q = self.sampled.log_q(student, labels, vocab)
        gap = self.sampled.log_q(lax.stop_gradient(teacher), labels, vocab) - log_q  # log r
        kd = {
            "advantage": lambda: -lax.stop_gradient(gap) * log_q,
            "k2": lambda: 0.5 * jnp.square(gap),
            "k3": lambda: jnp.exp(gap) - 1 - gap,
        }[self.signal]()
        if keep is not None:  # of a token that one side does not know nothing can be said
            known = jnp.broadcast_to(keep, (*labels.shape, keep.shape[-1])).astype(jnp.float32)
            kd = jnp.where(vocab.at(known, labels) > 0, kd, 0.0)
        reward = rows.get("advantage", 0.0)
        nll = ce(student, labels, vocab=vocab)
        loss = self.kd_ratio * on * watched[-1] * (kd - reward * log_q) + (1 - self.kd_ratio) * (1 - on) * nll
        return loss, *lax.stop_gradient((on * kd, nll)), *watched
