"""Functions of logits summed over one device's rows, a chunk of rows at a time, and their gradients in the same pass.

A chunk goes all the way before the next one starts: logits of both models, the functions, the slopes in the logits, and
the products of these slopes with hidden rows and weights. So logits exist for one chunk only, and are computed once.

Products want many rows and functions few: a head is read anew for each chunk, while what a function keeps at a time
should fit a cache. So functions run over blocks of a chunk, and slopes take the place of the logits that they come
from: whatever a function keeps, a chunk costs two arrays of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PyTree, Shaped

from kdjax.arrays import AnyArray
from kdjax.head import Head, product
from kdjax.losses.vocab import MASKED, Vocab

SLICE = 2**25  # entries of a weight's gradient that are added at a time


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

    known: PyTree[Shaped[AnyArray, " N"]] | None
    """What is known of each row: int32 labels, or a tree of arrays, or None."""
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
    """Student logits, teacher logits or None, known, keep, vocab, params -> K arrays of one float32 value a row."""
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
    parts = -(-chunk // _block_rows(columns))
    block = -(-chunk // parts)
    block += -block % vocab.parts  # by_rows hands every device the same number of rows
    chunk = parts * block

    def blocks(x: jax.Array) -> jax.Array:
        return resize(x, 0, count * chunk).reshape(count, chunk, *x.shape[1:])

    def step(carry, rows_here):
        sums, heads = carry
        hidden, known, mask = rows_here
        here = tuple(side._replace(hidden=h) for side, h in zip(sides, hidden, strict=True))
        fixed_here = fixed._replace(known=known, mask=mask)
        (more, values), gradients = _chunk(plan, vocab, here, fixed_here, asked, heads, block)
        return (sums + more, _only_heads(gradients)), (_only_hidden(gradients), values)

    totals, terms = fixed.mixture.shape
    zeros = jax.tree.map(lambda yes, x: jnp.zeros(x.shape, jnp.float32), asked, _where(asked, sides))
    start = jnp.zeros(terms, jnp.float32), _only_heads((zeros,) * totals)
    xs = jax.tree.map(blocks, (tuple(side.hidden for side in sides), fixed.known, fixed.mask))
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


def _chunk(plan: Plan, vocab: Vocab, sides: tuple[Side, ...], fixed: Fixed, asked: tuple[Side, ...], heads, block: int):
    """Sums and values of a chunk, its gradients of hidden rows, and those of the heads added to ``heads``."""
    # Rows without loss may hold anything, an unwritten pool row too, and 0 · NaN would reach the products.
    sides = tuple(side._replace(hidden=jnp.where(fixed.mask[:, None], side.hidden, 0)) for side in sides)
    raws = tuple(product(side.hidden, side.weight, head.layout) for side, head in zip(sides, plan.heads, strict=True))
    found, slopes, biases = _slopes(plan, vocab, raws, tuple(side.bias for side in sides), fixed, asked, block)
    gradients = tuple(
        tuple(_gradient(*of_side) for of_side in zip(sides, plan.heads, *one, asked, strict=True))
        for one in zip(slopes, biases, heads, strict=True)
    )
    return found, gradients


def _slopes(plan: Plan, vocab: Vocab, raws, biases, fixed: Fixed, asked: tuple[Side, ...], block: int):
    """Sums and values of a chunk, and for each total and side the slopes in ``raws`` [rows, V] and in the biases [V].

    Slopes are None for a side of which no gradient is asked.
    """
    rows, (count, terms) = raws[0].shape[0], fixed.mixture.shape
    wanted = tuple(bool(jax.tree.leaves(side)) for side in asked)
    # Slopes of the first total take the place of the logits, block by block; those of others need room of their own.
    first = tuple(raw if yes else None for raw, yes in zip(raws, wanted, strict=True))
    room = tuple(first if i == 0 else jax.tree.map(jnp.zeros_like, first) for i in range(count))
    in_biases = tuple(
        jnp.zeros(bias.shape, jnp.float32) if side.bias else None for bias, side in zip(biases, asked, strict=True)
    )

    def of_block(x: Any, start: jax.Array) -> Any:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block), x)

    def step(carry, start):
        sums, room, in_biases = carry
        logits = tuple(raw if own is None else own for raw, own in zip(raws, room[0] if room else first, strict=True))
        known, mask = of_block((fixed.known, fixed.mask), start)
        here = fixed._replace(known=known, mask=mask)
        of_logits = partial(_mixed, plan, vocab, here, wanted)
        _, pull, (more, values) = jax.vjp(of_logits, of_block(logits, start), biases, has_aux=True)
        for i, one in enumerate(jnp.eye(count)):
            slopes, added = pull(one)
            put = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
            room = (*room[:i], _where_given(put, room[i], slopes), *room[i + 1 :])
            in_biases = (*in_biases[:i], _where_given(jnp.add, in_biases[i], added), *in_biases[i + 1 :])
        return (sums + more, room, in_biases), values

    begin = jnp.zeros(terms, jnp.float32), room, (in_biases,) * count
    (sums, slopes, in_biases), values = lax.scan(step, begin, jnp.arange(0, rows, block))
    if plan.by_row:  # [blocks, K, rows of a block]
        values = jnp.moveaxis(values, 1, 0).reshape(terms, rows)
    return (sums, values), slopes, in_biases


def _mixed(plan: Plan, vocab: Vocab, fixed: Fixed, wanted: tuple[bool, ...], raws, biases):
    """The totals of a block; and the sums, with the values if ``plan.by_row``, that they are mixed from."""
    logits = [None, None]
    for i, (raw, bias) in enumerate(zip(raws, biases, strict=True)):
        z = _real(plan.heads[i].finish(raw, bias), plan.sizes[i], vocab)
        logits[i] = z if wanted[i] else lax.stop_gradient(z)
    values = plan.values(*logits, fixed.known, fixed.keep, vocab, fixed.params)
    each = [jnp.where(fixed.mask, value, 0) for value in values]
    sums = jnp.stack([value.sum() for value in each])
    return mix(fixed.mixture, sums), (sums, jnp.stack(each) if plan.by_row else None)


def _where_given(fn: Callable[..., jax.Array], olds: tuple, news: tuple) -> tuple:
    return tuple(None if old is None else fn(old, new) for old, new in zip(olds, news, strict=True))


def _gradient(
    side: Side, head: Head, slope: jax.Array | None, bias: jax.Array | None, so_far: Side, asked: Side
) -> Side:
    """The gradients of one side from the float32 slope [rows, V] in its raw product, added to those of its head."""
    if slope is None:
        return Side(None, None, None)
    slope = slope.astype(side.hidden.dtype)
    return Side(
        _product(f"nv,{head.layout}->nd", slope, side.weight) if asked.hidden else None,
        _add_outer(so_far.weight, side.hidden, slope, head.layout) if asked.weight else None,
        so_far.bias + bias if asked.bias else None,
    )


def _add_outer(total: jax.Array, hidden: jax.Array, slope: jax.Array, layout: str) -> jax.Array:
    """``total`` + hiddenᵀ · slope, in slices of the vocabulary: a product as large as the weight never exists."""
    axis, columns = layout.index("v"), slope.shape[1]
    width = -(-columns // -(-total.size // SLICE))
    for start in range(0, columns, width):
        end = min(start + width, columns)
        part = _product(f"nd,nv->{layout}", hidden, lax.slice_in_dim(slope, start, end, axis=1))
        part += lax.slice_in_dim(total, start, end, axis=axis)
        total = lax.dynamic_update_slice_in_dim(total, part, start, axis)
    return total


def _product(spec: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)


def _real(logits: jax.Array, size: int, vocab: Vocab) -> jax.Array:
    """Columns that only fill up the last device's part are no ids, for cross-entropy neither."""
    columns = logits.shape[-1]
    return logits if vocab.size(columns) == size else jnp.where(vocab.ids(columns) < size, logits, MASKED)


def _chunk_rows(columns: int) -> int:
    """Rows of a chunk: enough to outweigh reading a head and adding to its gradient, and no more.

    On a CPU 832 keep temporary memory at V = 151,936 under an eighth of whole logits' at 4,096 rows. Below a million
    logits the work for a chunk itself would show.
    """
    return max(832 if jax.default_backend() == "cpu" else 1024, 2**20 // columns)


def _block_rows(columns: int) -> int:
    """Rows of a block of about 16 MB on a CPU, whose caches it should fit, and 128 MB elsewhere."""
    return max(1, (2**22 if jax.default_backend() == "cpu" else 2**25) // columns)


def _where(asked: tuple[Side, ...], sides: tuple[Side, ...]) -> tuple[Side, ...]:
    return jax.tree.map(lambda yes, x: x if yes else None, asked, sides, is_leaf=lambda x: x is None)


def _only_heads(gradients):
    return tuple(tuple(side._replace(hidden=None) for side in one) for one in gradients)


def _only_hidden(gradients):
    return tuple(tuple(Side(side.hidden, None, None) for side in one) for one in gradients)
