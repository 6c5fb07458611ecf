"""The vocabulary axis of a block of logits, whole on this device or split over a mesh axis.

A divergence written with these reductions is written once: ``WHOLE`` makes it an ordinary function of full logits, and
``Vocab("tensor")`` makes the same function work on the columns that each device holds, exchanging a few numbers a row.

One rule keeps gradients right on a split axis, where every device adds up the same loss: what a reduction returns is
combined into the result by all devices alike. It flows back to the columns only through ``log_softmax``, ``sum``,
``take`` and ``by_rows``; anything else that joins a reduced number to the columns takes ``stop_gradient`` of it first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
"""The logit of an id that is left out. Its probability is exactly 0, as with −inf, but log-probabilities stay finite,
so that 0 · log 0 is 0 and no loss, a user's included, turns into NaN."""


@dataclass(frozen=True)
class Vocab:
    """Reductions over the last axis: of all ids (``axis=None``), or of the equal parts held along mesh axis ``axis``."""

    axis: str | None = None

    def size(self, columns: int) -> int:
        """How many ids there are in all."""
        return columns * (1 if self.axis is None else lax.axis_size(self.axis))

    def ids(self, columns: int) -> Int[Array, " V"]:
        """The vocabulary ids of this device's ``columns`` columns."""
        ids = jnp.arange(columns, dtype=jnp.int32)
        return ids if self.axis is None else ids + lax.axis_index(self.axis) * columns

    def sum(self, x: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
        return _total(x.sum(-1), self.axis)

    def max(self, x: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
        """The largest entry; without gradient."""
        top = lax.stop_gradient(x).max(-1)
        return top if self.axis is None else lax.pmax(top, self.axis)

    def argmax(self, x: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
        """The id of the largest entry, the lowest of equal ones."""
        x = lax.stop_gradient(x)
        if self.axis is None:
            return x.argmax(-1).astype(jnp.int32)
        first = x.argmax(-1).astype(jnp.int32)
        largest = x.max(-1)
        beyond = jnp.int32(jnp.iinfo(jnp.int32).max)
        here = largest == lax.pmax(largest, self.axis)
        return lax.pmin(jnp.where(here, first + self.ids(x.shape[-1])[0], beyond), self.axis)

    def top_k(self, x: Float[Array, "*rows V"], k: int) -> Int[Array, "*rows k"]:
        """The ids of the ``k`` largest entries, largest first, equal ones by ascending id."""
        x = lax.stop_gradient(x)
        values, ids = lax.top_k(x, min(k, x.shape[-1]))
        if self.axis is None:
            return ids
        # Parts are gathered in ascending order of ids and top_k is stable, so equal entries stay in that order.
        ids = ids + self.ids(x.shape[-1])[0]
        values, ids = (lax.all_gather(a, self.axis, axis=a.ndim - 1, tiled=True) for a in (values, ids))
        return jnp.take_along_axis(ids, lax.top_k(values, k)[1], axis=-1)

    def take(self, x: Float[Array, "*rows V"], ids: Int[Array, "*rows k"]) -> Float[Array, "*rows k"]:
        """``x`` at a few ids of each row."""
        if self.axis is None:
            return jnp.take_along_axis(x, ids, axis=-1)
        local = ids - self.ids(x.shape[-1])[0]
        here = (local >= 0) & (local < x.shape[-1])
        picked = jnp.take_along_axis(x, jnp.clip(local, 0, x.shape[-1] - 1), axis=-1)
        return _total(jnp.where(here, picked, 0), self.axis)

    def at(self, x: Float[Array, "*rows V"], ids: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
        """``x`` at one id of each row, as a masked sum: it fuses with its neighbours where a gather would not."""
        return self.sum(jnp.where(self.ids(x.shape[-1]) == ids[..., None], x, 0))

    def log_softmax(self, logits: Float[Array, "*rows V"]) -> Float[Array, "*rows V"]:
        return jax.nn.log_softmax(logits, axis=-1) if self.axis is None else _log_softmax(logits, self.axis)

    def by_rows(self, fn: Callable[..., Array], *blocks: Float[Array, "rows V"]) -> Float[Array, " rows"]:
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


def masked(logits: Float[Array, "*rows V"], keep: Bool[Array, " V"] | None) -> Float[Array, "*rows V"]:
    """``logits`` with the ids that are not in ``keep`` left out; None keeps all."""
    return logits if keep is None else jnp.where(keep, logits, MASKED)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _total(x: Array, axis: str | None) -> Array:
    return x if axis is None else lax.psum(x, axis)


# Every device adds up the same loss, so the cotangent of a total is complete where it arrives: it is not summed again.
_total.defvjp(lambda x, axis: (_total(x, axis), None), lambda axis, _, g: (g,))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _log_softmax(logits: Array, axis: str) -> Array:
    shifted = logits - lax.pmax(logits.max(-1, keepdims=True), axis)
    return shifted - jnp.log(lax.psum(jnp.exp(shifted).sum(-1, keepdims=True), axis))


def _log_softmax_backward(axis: str, log_p: Array, g: Array) -> tuple[Array]:
    return (g - jnp.exp(log_p) * lax.psum(g.sum(-1, keepdims=True), axis),)


def _log_softmax_forward(logits: Array, axis: str) -> tuple[Array, Array]:
    log_p = _log_softmax(logits, axis)
    return log_p, log_p


_log_softmax.defvjp(_log_softmax_forward, _log_softmax_backward)
