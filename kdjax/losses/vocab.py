"""The vocabulary axis of a block of logits, whole on this device or split over a mesh axis.

A divergence written with these reductions is written once: ``WHOLE`` makes it an ordinary function of full logits, and
``Vocab("tensor")`` makes the same function work on the columns that each device holds, exchanging a few numbers a row.

One rule keeps gradients right on a split axis: a number that a reduction returns must not meet the columns again,
unless it carries no gradient (``stop_gradient``). Where one does, as in ``log_softmax`` and ``nll``, the slope is
written out (the first; a second one is right on a whole axis alone). All else may be done with reduced numbers, as
every device does it alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import linear_call
from jaxtyping import Array, Bool, Float, Int

from kdjax import backend
from kdjax.arrays import AnyArray

MASKED = -1e30
"""The logit of an id that is left out. Its probability is exactly 0, as with −inf, but log-probabilities stay finite,
so that 0 · log 0 is 0 and no loss, a user's included, turns into NaN."""


@dataclass(frozen=True)
class Vocab:
    """Reductions over the last axis: all ids (``axis=None``), or the equal parts held along mesh axis ``axis``."""

    axis: str | None = None

    @property
    def parts(self) -> int:
        """How many devices share the vocabulary."""
        return 1 if self.axis is None else lax.axis_size(self.axis)

    def size(self, columns: int) -> int:
        """How many ids there are in all."""
        return columns * self.parts

    def ids(self, columns: int) -> Int[Array, " V"]:
        """The vocabulary ids of this device's ``columns`` columns."""
        ids = jnp.arange(columns, dtype=jnp.int32)
        return ids if self.axis is None else ids + lax.axis_index(self.axis) * columns

    def sum(self, x: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
        return _total(x.sum(-1), self.axis)

    def sums(self, *arrays: Float[Array, "*rows V"]) -> tuple[Float[Array, "*rows"], ...]:
        """``sum`` of several arrays in one pass over what they are made of."""
        return tuple(_total(x, self.axis) for x in _sums(*(x.astype(jnp.float32) for x in arrays)))

    def argmax(self, x: Float[AnyArray, "*rows V"]) -> Int[Array, "*rows"]:
        """The id of the largest entry, the lowest of equal ones."""
        x = lax.stop_gradient(x)
        first = x.argmax(-1).astype(jnp.int32)
        if self.axis is None:
            return first
        largest = x.max(-1)
        here = largest == lax.pmax(largest, self.axis)
        return lax.pmin(jnp.where(here, first + self.ids(x.shape[-1])[0], self.size(x.shape[-1])), self.axis)

    def top_k(self, x: Float[AnyArray, "*rows V"], k: int) -> Int[Array, "*rows k"]:
        """The ids of the ``k`` largest entries, largest first, equal ones by ascending id."""
        x = lax.stop_gradient(x)
        x = jnp.where(x == 0, 0, x)  # lax.top_k puts -0.0 behind 0.0
        values, ids = lax.top_k(x, min(k, x.shape[-1]))
        if self.axis is None:
            return ids
        # Parts are gathered in ascending order of ids and top_k is stable, so equal entries stay in that order.
        ids = ids + self.ids(x.shape[-1])[0]
        values, ids = (lax.all_gather(a, self.axis, axis=a.ndim - 1, tiled=True) for a in (values, ids))
        return jnp.take_along_axis(ids, lax.top_k(values, k)[1], axis=-1)

    def take(self, x: Float[AnyArray, "*rows V"], ids: Int[AnyArray, "*rows k"]) -> Float[Array, "*rows k"]:
        """``x`` at a few ids of each row."""
        if self.axis is None:
            return jnp.take_along_axis(x, ids, axis=-1)
        local = ids - self.ids(x.shape[-1])[0]
        here = (local >= 0) & (local < x.shape[-1])
        picked = jnp.take_along_axis(x, jnp.clip(local, 0, x.shape[-1] - 1), axis=-1)
        return _total(jnp.where(here, picked, 0), self.axis)

    def at(self, x: Float[AnyArray, "*rows V"], ids: Int[AnyArray, "*rows"]) -> Float[Array, "*rows"]:
        """``x`` at one id of each row, as a masked sum: it fuses with its neighbours where a gather would not."""
        return self.sum(jnp.where(self.ids(x.shape[-1]) == ids[..., None], x, 0))

    def log_softmax(self, logits: Float[AnyArray, "*rows V"]) -> Float[Array, "*rows V"]:
        return _log_softmax(logits, self)

    def nll(self, logits: Float[AnyArray, "*rows V"], labels: Int[AnyArray, "*rows"]) -> Float[Array, "*rows"]:
        """−log softmax(logits)[label]."""
        return _nll(logits, labels, self)

    def normaliser(self, logits: Float[AnyArray, "*rows V"]) -> tuple[Float[Array, "*rows V"], Float[Array, "*rows 1"]]:
        """The logits below their row's largest, and the logarithm of the sum of their exponentials.

        log softmax is the one less the other, both float32. For functions whose slope is written out.
        """
        logits = logits.astype(jnp.float32)
        top, exps = _largest_and_sum(logits)
        if self.axis is not None:
            own, top = top, lax.pmax(top, self.axis)
            exps = lax.psum(exps * jnp.exp(own - top), self.axis)
        return logits - top, jnp.log(exps)

    def by_rows(self, fn: Callable[..., Array], *blocks: Float[AnyArray, "rows V"]) -> Float[Array, " rows"]:
        """``fn`` of whole rows, for a function that knows nothing of a split axis.

        Each device exchanges its columns of all rows for all columns of its share of the rows, so that this one block
        moves once and nothing is computed twice. The number of rows must divide by the axis.
        """
        if self.axis is None:
            return fn(*blocks)
        whole = [lax.all_to_all(x, self.axis, split_axis=0, concat_axis=1, tiled=True) for x in blocks]
        mine = fn(*whole)
        rows = jnp.zeros(blocks[0].shape[0], mine.dtype)
        start = lax.axis_index(self.axis) * mine.shape[0]
        return _total(lax.dynamic_update_slice_in_dim(rows, mine, start, 0), self.axis)


WHOLE = Vocab()


def masked(logits: Float[AnyArray, "*rows V"], keep: Bool[AnyArray, " V"] | None) -> Float[Array, "*rows V"]:
    """``logits`` with the ids that are not in ``keep`` left out; None keeps all."""
    return logits if keep is None else jnp.where(keep, logits, MASKED)


def floored(logits: Float[AnyArray, "*rows V"]) -> Float[Array, "*rows V"]:
    """float32 logits with ``MASKED`` for −inf. The slope is passed on as it is: a probability of 0 has made it 0."""
    return _floored(logits.astype(jnp.float32))


@jax.custom_jvp
def _floored(logits: AnyArray) -> Array:
    # Not a maximum, for which XLA on a CPU first fills a block with the floor.
    return lax.clamp(jnp.float32(MASKED), logits, jnp.float32(jnp.inf))


_floored.defjvp(lambda logits, tangent: (_floored(*logits), *tangent))


def _total(x: Array, axis: str | None) -> Array:
    if axis is None:
        return x
    # Every device adds up the same loss, so the slope in a total is whole where it arrives: it is not summed again.
    return linear_call(lambda _, x: lax.psum(x, axis), lambda _, slope: slope, (), x)


@jax.custom_jvp
def _sums(*arrays: Array) -> tuple[Array, ...]:
    """Each summed over its last axis. As one reduction where memory is what a pass costs: XLA would write what several
    have in common, and read it for each."""
    if backend.on_cpu():
        return tuple(x.sum(-1) for x in arrays)

    def added(one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(a + b for a, b in zip(one, other, strict=True))

    return tuple(lax.reduce(arrays, (jnp.float32(0),) * len(arrays), added, (arrays[0].ndim - 1,)))


_sums.defjvp(lambda arrays, tangents: (_sums(*arrays), tuple(x.sum(-1) for x in tangents)))


@jax.custom_jvp
def _largest_and_sum(x: AnyArray) -> tuple[Array, Array]:
    """The largest entry of each row, and the sum of the exponentials of what lies below it, both [..., 1].

    In one pass (1805.02867) where memory is what a pass costs: half of what a maximum and then a sum take.
    """
    if backend.on_cpu():
        top = x.max(-1, keepdims=True)
        return top, jnp.exp(x - top).sum(-1, keepdims=True)

    def merged(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        (top, exps), (other_top, other_exps) = one, other
        scale = jnp.exp(-jnp.abs(top - other_top))
        return jnp.maximum(top, other_top), jnp.where(
            top >= other_top, exps + other_exps * scale, exps * scale + other_exps
        )

    nothing = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
    top, exps = lax.reduce((x, jnp.ones_like(x)), nothing, merged, (x.ndim - 1,))
    return top[..., None], exps[..., None]


@_largest_and_sum.defjvp
def _largest_and_sum_slope(primals: tuple[AnyArray], tangents: tuple[Array]) -> tuple[Any, Any]:
    # The largest is a mere shift: what is made of the two does not depend on it, and so it carries no gradient.
    top, exps = _largest_and_sum(*primals)
    slope = (jnp.exp(primals[0] - top) * tangents[0]).sum(-1, keepdims=True)
    return (top, exps), (jnp.zeros_like(top), slope)


# The slopes are written out to keep one array of the block's size, where automatic ones would keep three.
@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _log_softmax(logits: AnyArray, vocab: Vocab) -> Array:
    below, log_sum = vocab.normaliser(logits)
    return below - log_sum


@_log_softmax.defjvp
def _log_softmax_slope(vocab: Vocab, logits: tuple[Array], tangent: tuple[Array]) -> tuple[Array, Array]:
    log_p = _log_softmax(*logits, vocab)
    inner = (jnp.exp(log_p) * tangent[0]).sum(-1, keepdims=True)
    return log_p, tangent[0] - (inner if vocab.axis is None else lax.psum(inner, vocab.axis))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _nll(logits: AnyArray, labels: AnyArray, vocab: Vocab) -> Array:
    below, log_sum = vocab.normaliser(logits)
    if vocab.axis is None and backend.on_cpu():  # a pass over the block less
        picked = jnp.take_along_axis(below, labels[..., None], axis=-1, mode="fill", fill_value=0)
        return (log_sum - picked)[..., 0]
    return log_sum[..., 0] - vocab.at(below, labels)


@_nll.defjvp
def _nll_slope(vocab: Vocab, primals: tuple[AnyArray, AnyArray], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    logits, labels = primals
    below, log_sum = vocab.normaliser(logits)
    hot = vocab.ids(logits.shape[-1]) == labels[..., None]
    slope = (jnp.exp(below - log_sum) - hot) * tangents[0]
    return _nll(logits, labels, vocab), vocab.sum(slope)
