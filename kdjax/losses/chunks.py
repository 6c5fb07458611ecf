"""Functions of logits summed over one device's rows, a chunk of rows at a time, and their gradients in the same pass.

A chunk goes all the way before the next one starts: logits of both models, the functions, the slopes in the logits, and
the products of these slopes with hidden rows and weights. So logits exist for one chunk only, and are computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from kdjax.losses.head import Head, product
from kdjax.losses.vocab import MASKED, Vocab


class Side(NamedTuple):
    """What of student or teacher may carry a gradient. The same shape holds gradients, None where there is none."""

    hidden: Any
    """[N, D]"""
    weight: Any
    """[D, V] or [V, D]"""
    bias: Any
    """[V] or None"""


class Fixed(NamedTuple):
    """What never carries a gradient."""

    labels: Any
    """int32 [N] or None, or a tree of [N] arrays: what is known of each row"""
    mask: Any
    """bool [N]"""
    keep: Any
    """bool [V] or None: the ids that divergences compare; None: all"""
    mixture: Any
    """float32 [M, K]: each total is a mixture of the K sums"""
    params: Any
    """Parameters of the functions that are arrays, by name"""


@dataclass(frozen=True)
class Plan:
    """The static part of a call."""

    values: Callable[..., tuple[jax.Array, ...]]
    """Student logits, teacher logits or None, labels, keep, vocab, params -> K arrays of one float32 value a row."""
    heads: tuple[Head, ...]
    """The student's and, if there is one, the teacher's, without arrays."""
    sizes: tuple[int, ...]
    """Their vocabularies."""
    chunk_rows: int | None
    mesh: Mesh | AbstractMesh | None
    by_row: bool = False
    """Also return the K values of every row, [K, N]."""


def sums_and_gradients(
    plan: Plan, vocab: Vocab, sides: tuple[Side, ...], fixed: Fixed, asked: tuple[Side, ...]
) -> tuple[tuple[jax.Array, jax.Array | None], tuple[tuple[Side, ...], ...]]:
    """The sums [K] over these rows, the values [K, N] if ``plan.by_row``, and the gradients of each of the M totals.

    ``asked`` is True where a gradient is wanted and None where not; nothing is formed there, if nowhere nothing at all.
    Gradients of weights and biases are summed in float32. With ``vocab`` split, those of hidden rows are this device's
    share of them.
    """
    rows = fixed.mask.shape[0]
    columns = max(side.weight.shape[head.layout.index("v")] for side, head in zip(sides, plan.heads, strict=True))
    count = -(-rows // (plan.chunk_rows or _chunk_rows(columns)))
    chunk = -(-rows // count)
    chunk += -chunk % vocab.parts  # by_rows hands every device the same number of rows

    def blocks(x: jax.Array) -> jax.Array:
        return resize(x, 0, count * chunk).reshape(count, chunk, *x.shape[1:])

    def step(carry, block):
        sums, heads = carry
        hidden, labels, mask = block
        here = tuple(side._replace(hidden=h) for side, h in zip(sides, hidden, strict=True))
        (more, values), gradients = _chunk(plan, vocab, here, fixed._replace(labels=labels, mask=mask), asked)
        heads = jax.tree.map(jnp.add, heads, _only_heads(gradients))
        return (sums + more, heads), (_only_hidden(gradients), values)

    totals, terms = fixed.mixture.shape
    zeros = jax.tree.map(lambda yes, x: jnp.zeros(x.shape, jnp.float32), asked, _where(asked, sides))
    start = jnp.zeros(terms, jnp.float32), _only_heads((zeros,) * totals)
    xs = jax.tree.map(blocks, (tuple(side.hidden for side in sides), fixed.labels, fixed.mask))
    (sums, heads), (hidden, values) = lax.scan(step, start, xs)
    hidden = jax.tree.map(lambda x: x.reshape(count * chunk, -1)[:rows], hidden)
    gradients = tuple(
        tuple(h._replace(hidden=r.hidden) for h, r in zip(*one, strict=True)) for one in zip(heads, hidden, strict=True)
    )
    if plan.by_row:  # [chunks, K, rows of a chunk]
        values = jnp.moveaxis(values, 1, 0).reshape(terms, count * chunk)[:, :rows]
    return (sums, values), gradients


def mix(mixture: jax.Array, sums: jax.Array) -> jax.Array:
    """[M] of [M, K] and [K]; not as a matrix product, which may round to fewer bits on an accelerator."""
    return (mixture * sums).sum(-1)


def resize(x: jax.Array | None, axis: int, size: int) -> jax.Array | None:
    """``x`` with zeros added or entries cut off at the end of ``axis``; None stays None."""
    if x is None or x.shape[axis] == size:
        return x
    if x.shape[axis] > size:
        return lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, size - n if i == axis % x.ndim else 0) for i, n in enumerate(x.shape)])


def _chunk(plan: Plan, vocab: Vocab, sides: tuple[Side, ...], fixed: Fixed, asked: tuple[Side, ...]):
    # Rows without loss may hold anything, an unwritten pool row too, and 0 · NaN would reach the products.
    sides = tuple(side._replace(hidden=jnp.where(fixed.mask[:, None], side.hidden, 0)) for side in sides)
    raws = [product(side.hidden, side.weight, head.layout) for side, head in zip(sides, plan.heads, strict=True)]

    def totals(raws, biases):
        logits = [None, None]
        for i, (raw, bias, wanted) in enumerate(zip(raws, biases, asked, strict=True)):
            z = _real(plan.heads[i].finish(raw, bias), plan.sizes[i], vocab)
            logits[i] = z if jax.tree.leaves(wanted) else lax.stop_gradient(z)
        values = plan.values(*logits, fixed.labels, fixed.keep, vocab, fixed.params)
        each = [jnp.where(fixed.mask, value, 0) for value in values]
        sums = jnp.stack([value.sum() for value in each])
        return mix(fixed.mixture, sums), (sums, jnp.stack(each) if plan.by_row else None)

    mixed, pull, found = jax.vjp(totals, raws, [side.bias for side in sides], has_aux=True)
    gradients = []
    for one in jnp.eye(mixed.shape[0]):
        slopes, biases = pull(one)
        of_sides = zip(sides, plan.heads, slopes, biases, asked, strict=True)
        gradients.append(tuple(_gradient(*of_side) for of_side in of_sides))
    return found, tuple(gradients)


def _gradient(side: Side, head: Head, slope: jax.Array, bias: jax.Array | None, asked: Side) -> Side:
    """The gradients of one side from the float32 slope [rows, V] in its raw product."""
    slope = slope.astype(side.hidden.dtype)

    def times(spec: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)

    return Side(
        times(f"nv,{head.layout}->nd", slope, side.weight) if asked.hidden else None,
        times(f"nd,nv->{head.layout}", side.hidden, slope) if asked.weight else None,
        bias.astype(jnp.float32) if asked.bias else None,
    )


def _real(logits: jax.Array, size: int, vocab: Vocab) -> jax.Array:
    """Columns that only fill up the last device's part are no ids, for cross-entropy neither."""
    columns = logits.shape[-1]
    return logits if vocab.size(columns) == size else jnp.where(vocab.ids(columns) < size, logits, MASKED)


def _chunk_rows(columns: int) -> int:
    """Rows of a chunk: enough to outweigh the traffic of adding a weight-sized gradient after each, and no more.

    At V = 151,936 on two cores, chunks of 256, 384 and 512 rows took 1.4, 1.2 and 1.1 times as long as whole logits;
    480 keeps temporary memory under an eighth of theirs at 4,096 rows. An accelerator does more arithmetic per byte.
    Below a million logits the work for a chunk itself would show.
    """
    return max(480 if jax.default_backend() == "cpu" else 1024, 2**20 // columns)


def _where(asked: tuple[Side, ...], sides: tuple[Side, ...]) -> tuple[Side, ...]:
    return jax.tree.map(lambda yes, x: x if yes else None, asked, sides, is_leaf=lambda x: x is None)


def _only_heads(gradients):
    return tuple(tuple(side._replace(hidden=None) for side in one) for one in gradients)


def _only_hidden(gradients):
    return tuple(tuple(Side(side.hidden, None, None) for side in one) for one in gradients)
