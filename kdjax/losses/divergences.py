"""The divergences between a teacher's and a student's next-token distribution, and cross-entropy.

p = softmax(teacher / τ), q = softmax(student / τ), natural logarithms, float32, no τ² factor. Each function maps
float logits [..., V] and [..., V] to a float32 value [...] and is differentiable in both. A logit of −inf leaves its id
out; left out on both sides it changes neither values nor gradients.

Terms are added up in the form p·log(p/q) − p + q, whose last two parts cancel over the vocabulary: no term is negative,
a term is zero with zero slope where p = q, and an error of the normalisation enters only in second order, which keeps
float32 sums over 150,000 ids to six digits.

``vocab`` says what the last axis is (see ``kdjax.losses.vocab``); leave it alone for ordinary logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from kdjax.arrays import AnyArray, Number
from kdjax.backend import again
from kdjax.errors import UserError
from kdjax.losses.registry import register_divergence
from kdjax.losses.vocab import WHOLE, Vocab, floored

Logits = Float[AnyArray, "*rows V"]
Values = Float[Array, "*rows"]
TINY = jnp.finfo(jnp.float32).tiny
Normalised = tuple[Float[Array, "*rows V"], Float[Array, "*rows 1"]]


@register_divergence("kl", split_vocab=True)
def kl(student_logits: Logits, teacher_logits: Logits, *, temperature: Number = 1.0, vocab: Vocab = WHOLE) -> Values:
    """Forward KL(p ‖ q) = Σ p (log p − log q), the loss of Hinton et al., 1503.02531."""
    student, teacher = _scaled(student_logits, teacher_logits, temperature)
    return _kl(teacher, student, vocab)


@register_divergence("rkl", split_vocab=True)
def rkl(student_logits: Logits, teacher_logits: Logits, *, temperature: Number = 1.0, vocab: Vocab = WHOLE) -> Values:
    """Reverse KL(q ‖ p) = Σ q (log q − log p), as in MiniLLM, 2306.08543."""
    student, teacher = _scaled(student_logits, teacher_logits, temperature)
    return _kl(student, teacher, vocab)


@register_divergence("jsd", split_vocab=True)
def jsd(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Number = 1.0,
    jsd_beta: Number = 0.5,
    vocab: Vocab = WHOLE,
) -> Values:
    """Generalised Jensen-Shannon: β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = βp + (1 − β)q (GKD, 2306.13649).

    β weights the teacher and lies strictly between 0 and 1; at the ends the value would vanish: take kl or rkl. It may
    be scheduled, and gets no gradient.
    """
    _require("jsd_beta", jsd_beta, "strictly between 0 and 1", lambda b: 0 < b < 1)
    student, teacher = _scaled(student_logits, teacher_logits, temperature)
    return _jsd(student, teacher, jsd_beta, vocab)


@register_divergence("skl", split_vocab=True)
def skl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Number = 1.0,
    skew_lambda: Number = 0.1,
    vocab: Vocab = WHOLE,
) -> Values:
    """Skew KL(p ‖ λp + (1 − λ)q), 0 ≤ λ < 1 (DistiLLM, 2402.03898)."""
    _require("skew_lambda", skew_lambda, "at least 0 and below 1", lambda s: 0 <= s < 1)
    student, teacher = _scaled(student_logits, teacher_logits, temperature)
    return _skewed(teacher, student, skew_lambda, vocab)


@register_divergence("srkl", split_vocab=True)
def srkl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Number = 1.0,
    skew_lambda: Number = 0.1,
    vocab: Vocab = WHOLE,
) -> Values:
    """Skew reverse KL(q ‖ (1 − λ)p + λq), 0 ≤ λ < 1 (DistiLLM, 2402.03898)."""
    _require("skew_lambda", skew_lambda, "at least 0 and below 1", lambda s: 0 <= s < 1)
    student, teacher = _scaled(student_logits, teacher_logits, temperature)
    return _skewed(student, teacher, skew_lambda, vocab)


@register_divergence("akl", split_vocab=True)
def akl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Number = 1.0,
    adaptive_alpha: Number = 0.5,
    vocab: Vocab = WHOLE,
) -> Values:
    """Adaptive KL: w KL(p ‖ q) + (1 − w) KL(q ‖ p), w = g_head / (g_head + g_tail) (2404.02657).

    g is Σ|p − q| over the head or the tail. The tail is the least likely teacher tokens whose cumulative p stays ≤ α,
    equal ones taken by ascending id. No gradient flows through w; it is 1 where both gaps are 0.
    """
    _require("adaptive_alpha", adaptive_alpha, "between 0 and 1", lambda a: 0 <= a <= 1)
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, vocab)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gap = jnp.abs(p - q)
    tail = _tail(*lax.stop_gradient((floored(teacher_logits / temperature), p)), adaptive_alpha, vocab)
    in_head, in_tail = vocab.sum(jnp.where(tail, 0, gap)), vocab.sum(jnp.where(tail, gap, 0))
    both = in_head + in_tail
    w = lax.stop_gradient(jnp.where(both > 0, in_head / jnp.where(both > 0, both, 1), 1))[..., None]
    return vocab.sum((w * p - (1 - w) * q) * (log_p - log_q) + (1 - 2 * w) * (p - q))


@register_divergence("tvd", split_vocab=True)
def tvd(student_logits: Logits, teacher_logits: Logits, *, temperature: Number = 1.0, vocab: Vocab = WHOLE) -> Values:
    """Total variation distance ½ Σ |p − q|."""
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, vocab)
    return 0.5 * vocab.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)))


@register_divergence("top1_ce", split_vocab=True)
def top1_ce(
    student_logits: Logits, teacher_logits: Logits, *, temperature: Number = 1.0, vocab: Vocab = WHOLE
) -> Values:
    """−max p · log q[argmax p]: cross-entropy on the teacher's choice (the lowest id of equal ones), weighted by p."""
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, vocab)
    best = vocab.argmax(teacher_logits)
    return -jnp.exp(vocab.at(log_p, best)) * vocab.at(log_q, best)


@register_divergence("hrl", split_vocab=True)
def hrl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: Number = 1.0,
    hrl_topk: int = 5,
    vocab: Vocab = WHOLE,
) -> Values:
    """Hinge ranking loss on the ``hrl_topk`` most likely ids T of p and S of q.

    Σ_i max(0, q[T_i] − q[T_0]) + Σ_ij 1[p[T_i] > p[S_j]] · max(0, q[S_j] − q[T_i]). Its definition has no temperature:
    the argument is there so that all divergences are called alike, and has no effect.
    """
    _require("hrl_topk", hrl_topk, "a whole number of at least 1", lambda k: k >= 1 and k == int(k))
    size = vocab.size(student_logits.shape[-1])
    if hrl_topk > size:
        raise UserError(f"hrl_topk is {hrl_topk}, more than the vocabulary's {size} ids")
    log_q, _ = _log_probs(student_logits, teacher_logits, 1.0, vocab)
    ranks = lax.stop_gradient(floored(teacher_logits))  # ordered as p, and finer than p in float32
    teacher_top, student_top = vocab.top_k(ranks, hrl_topk), vocab.top_k(floored(student_logits), hrl_topk)
    q_teacher, q_student = jnp.exp(vocab.take(log_q, teacher_top)), jnp.exp(vocab.take(log_q, student_top))
    p_teacher, p_student = vocab.take(ranks, teacher_top), vocab.take(ranks, student_top)
    swapped = p_teacher[..., :, None] > p_student[..., None, :]
    misplaced = jax.nn.relu(q_student[..., None, :] - q_teacher[..., :, None])
    return jax.nn.relu(q_teacher - q_teacher[..., :1]).sum(-1) + jnp.where(swapped, misplaced, 0).sum((-2, -1))


@register_divergence("ce", split_vocab=True)
def ce(student_logits: Logits, labels: Int[AnyArray, "*rows"], *, vocab: Vocab = WHOLE) -> Values:
    """Cross-entropy −log q[label] at τ = 1, over the student's whole softmax."""
    return vocab.nll(floored(student_logits), labels)


def _scaled(student: AnyArray, teacher: AnyArray, temperature: Number) -> tuple[Array, Array]:
    """Both logits divided by the temperature, in float32."""
    _require("temperature", temperature, "above 0", lambda t: t > 0)
    if student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"student logits {student.shape} and teacher logits {teacher.shape} differ in vocabulary; "
            "cut both to the common ids and mask those that one side lacks by -inf"
        )
    return floored(student / temperature), floored(teacher / temperature)


def _log_probs(student: AnyArray, teacher: AnyArray, temperature: Number, vocab: Vocab) -> tuple[Array, Array]:
    log_q, log_p = (vocab.log_softmax(x) for x in _scaled(student, teacher, temperature))
    return log_q, log_p


# KL(a ‖ b) of two logits. Its slopes are written out: b − a in the logits of b, with no further sum over a block.
@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kl(a: Array, b: Array, vocab: Vocab) -> Array:
    return vocab.sum(_gap_terms(*_probs_and_gap(vocab.normaliser(a), vocab.normaliser(b))))


@partial(_kl.defjvp, symbolic_zeros=True)
def _kl_slope(vocab: Vocab, logits: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    both = tuple(vocab.normaliser(x) for x in logits)
    value = vocab.sum(_gap_terms(*_probs_and_gap(*both)))
    a, b, gap = _probs_and_gap(*_again(*both))
    da, db = tangents
    slope = jnp.zeros_like(value)
    if not isinstance(db, SymbolicZero):
        slope += vocab.sum((b - a) * db)
    if not isinstance(da, SymbolicZero):
        slope += vocab.sum(a * (gap - value[..., None]) * da)
    return value, slope


def _probs_and_gap(a: Normalised, b: Normalised) -> tuple[Array, Array, Array]:
    """Both distributions and log a − log b, each [..., V], of what ``Vocab.normaliser`` says of either's logits.

    Made of what lies below each row's largest, so that no array of log-probabilities has to be written.
    """
    (below_a, sum_a), (below_b, sum_b) = a, b
    gap = (below_a - below_b) - (sum_a - sum_b)
    return jnp.exp(below_a - sum_a), jnp.exp(below_b - sum_b), gap


def _gap_terms(a: Array, b: Array, gap: Array) -> Array:
    return a * gap - a + b


# KL(a ‖ m) of two logits, m = share · a + (1 − share) · b. With r = a / m its slopes in the logits are, of b,
# (1 − share) b (Σ b r − r), and, of a, a (g − Σ a g) where g = log a − log m − share · r.
@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _skewed(a: Array, b: Array, share: Number, vocab: Vocab) -> Array:
    return vocab.sum(_Mixture.of(share, vocab.normaliser(a), vocab.normaliser(b)).terms)


@partial(_skewed.defjvp, symbolic_zeros=True)
def _skewed_slope(vocab: Vocab, primals: tuple[Array, Array, Number], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    *logits, share = primals
    (da, db, _), both = tangents, tuple(vocab.normaliser(x) for x in logits)
    sums = [_Mixture.of(share, *both).terms]
    if in_b := not isinstance(db, SymbolicZero):
        mixed = _Mixture.of(share, *(both := _again(*both)))
        sums.append(mixed.b * mixed.ratio)
    if in_a := not isinstance(da, SymbolicZero):
        mixed = _Mixture.of(share, *(both := _again(*both)))
        sums.append(mixed.a * (mixed.gap - share * mixed.ratio))
    value, *means = vocab.sums(*sums)
    means = [mean[..., None] for mean in means]
    mixed, slope = _Mixture.of(share, *_again(*both)), jnp.zeros_like(value)
    if in_b:
        slope += vocab.sum((1 - share) * mixed.b * (means[0] - mixed.ratio) * db)
    if in_a:
        slope += vocab.sum(mixed.a * (mixed.gap - share * mixed.ratio - means[-1]) * da)
    return value, slope


# Its slope in the logits of q is (1 − β) q (log q − log m − KL(q ‖ m)), that in those of p alike.
@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _jsd(student: Array, teacher: Array, beta: Number, vocab: Vocab) -> Array:
    return _jsd_and_gaps((vocab.normaliser(student), vocab.normaliser(teacher)), beta, vocab)[0]


@partial(_jsd.defjvp, symbolic_zeros=True)
def _jsd_slope(vocab: Vocab, primals: tuple[Array, Array, Number], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    *logits, beta = primals
    both = tuple(vocab.normaliser(x) for x in logits)
    value, to_q, to_p = _jsd_and_gaps(both, beta, vocab)
    q, p = _again(*_again(*both))
    slope = jnp.zeros_like(value)
    for share, one, other, own, tangent in ((1 - beta, q, p, to_q, tangents[0]), (beta, p, q, to_p, tangents[1])):
        if not isinstance(tangent, SymbolicZero):
            mixed = _Mixture.of(share, one, other)
            slope += vocab.sum(share * mixed.a * (mixed.gap - own[..., None]) * tangent)
    return value, slope


def _jsd_and_gaps(both: tuple[Normalised, Normalised], beta: Number, vocab: Vocab) -> tuple[Array, Array, Array]:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) of student and teacher, and of these KL(q ‖ m) and KL(p ‖ m), each [...]."""
    (q, p), (q_again, p_again) = both, _again(*both)
    to_q, to_p = vocab.sums(_Mixture.of(1 - beta, q, p).terms, _Mixture.of(beta, p_again, q_again).terms)
    return beta * to_p + (1 - beta) * to_q, to_q, to_p


class _Mixture(NamedTuple):
    """Two distributions and what they have to do with m = share · a + (1 − share) · b, each [..., V]."""

    a: Array
    b: Array
    m: Array
    gap: Array
    """log a − log m; where both vanish some finite number, which is only ever multiplied by 0."""

    @classmethod
    def of(cls, share: Number, a: Normalised, b: Normalised) -> _Mixture:
        log_a, log_b = (below - log_sum for below, log_sum in (a, b))
        a, b = jnp.exp(log_a), jnp.exp(log_b)
        m = share * a + (1 - share) * b
        return cls(a, b, m, log_a - jnp.log(jnp.maximum(m, TINY)))

    @property
    def terms(self) -> Array:
        """Whose sum is KL(a ‖ m)."""
        return self.a * self.gap - self.a + self.m

    @property
    def ratio(self) -> Array:
        """a / m"""
        return self.a / jnp.maximum(self.m, TINY)


def _again(*both: Normalised) -> tuple[Normalised, ...]:
    """What ``Vocab.normaliser`` said, for a sum or a slope that is to read the logits anew; see ``backend.again``."""
    return tuple((below, *again(log_sum)) for below, log_sum in both)


def _tail(logits: Array, p: Array, alpha: Number, vocab: Vocab) -> Bool[Array, "*rows V"]:
    """The tail of akl by two bisections: on the threshold, then on the ids of the tokens that lie at the threshold.

    Sorting would need whole rows on one device, and costs more there than these masked sums.
    """
    ids = vocab.ids(p.shape[-1])

    def exceeds(taken: Array) -> Array:
        return vocab.sum(jnp.where(taken, p, 0)) > alpha

    def first(exceeds_at: Callable[[Array], Array], low: Array, high: Array) -> Array:
        """The smallest number in (low, high] whose test holds; ``high`` if none does."""

        def halve(span: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = span
            middle = (low & high) + ((low ^ high) >> 1)  # the mean rounded down, without overflow
            over = exceeds_at(middle)
            return jnp.where(over, low, middle), jnp.where(over, middle, high)

        return lax.while_loop(lambda span: (span[0] + 1 < span[1]).any(), halve, (low, high))[1]

    def number(key: Array) -> Array:
        """The float of an integer key; keys are ordered as their floats."""
        return lax.bitcast_convert_type(jnp.where(key < 0, key ^ jnp.int32(0x7FFFFFFF), key), jnp.float32)[..., None]

    rows = jnp.zeros(p.shape[:-1], jnp.int32)
    infinity = 0x7F800000
    key = first(lambda key: exceeds(logits <= number(key)), rows - infinity - 1, rows + infinity)
    below, at = logits < number(key), logits == number(key)
    alone = vocab.sum(at.astype(jnp.float32)) <= 1
    end = jnp.where(alone, 0, vocab.size(p.shape[-1]))
    last = first(lambda last: exceeds(below | (at & (ids <= last[..., None]))), rows - 1, end)
    return below | (at & (ids < last[..., None]))


def _require(name: str, value: Number, what: str, holds: Callable[[Number], bool]) -> None:
    # A traced value, such as a scheduled temperature, is known only on the device.
    if not isinstance(value, jax.core.Tracer) and not holds(value):
        raise UserError(f"{name} is {value}, it must be {what}")
