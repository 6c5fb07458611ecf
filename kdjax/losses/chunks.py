"""Functions of logits summed over one device's rows, a chunk of rows at a time, and their gradients in the same pass.

Logits of both models, the functions, the slopes in the logits: a chunk goes all this way before the next one starts, so
logits exist for one chunk only, and are computed once. The products of slopes with hidden rows and weights follow for a
group of chunks at a time.

Each size is what one kind of work wants. Functions want few rows, as what they keep at a time should fit a cache: they
run over blocks of a chunk, and slopes take the place of the logits that they come from, so whatever a function keeps, a
chunk costs two arrays of logits. Products want many: a head is read anew for each chunk, and its gradient is read and
written anew for each group. That is the dearer one on a GPU, where a group's slopes, in the dtype of the hidden rows,
take as much room as the head's gradient does in float32; on a CPU, where products are slow enough to hide it, a group
is one chunk.
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

from kdjax import backend
from kdjax.arrays import AnyArray
from kdjax.head import Head, product
from kdjax.losses.vocab import MASKED, Vocab

SLICE = 2**25  # entries of a weight's gradient that are added at a time on a CPU


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

    ``asked`` is a dtype where a gradient is wanted and None where not; nothing is formed there, if nowhere nothing at
    all. Gradients are summed in float32 and come so, but a weight's comes in the dtype asked where one product makes
    it. With ``vocab`` split, those of hidden rows are this device's share of them.
    """
    rows, totals, terms = fixed.mask.shape[0], *fixed.mixture.shape
    sizes = _sizes(plan, vocab, sides, rows)

    def step(carry, rows_here):
        sums, heads = carry
        hidden, known, mask = rows_here
        here = tuple(side._replace(hidden=h) for side, h in zip(sides, hidden, strict=True))
        fixed_here = fixed._replace(known=known, mask=mask)
        (more, values), gradients = _group(plan, vocab, here, fixed_here, asked, heads, sizes)
        return (sums + more, _only_heads(gradients)), (_only_hidden(gradients), values)

    xs = (tuple(side.hidden for side in sides), fixed.known, fixed.mask)
    xs = jax.tree.map(lambda x: _parts(resize(x, 0, sizes.rows), sizes.groups), xs)
    nothing = jax.tree.map(lambda yes, x: jnp.zeros(x.shape, jnp.float32), asked, _where(asked, sides))
    start = jnp.zeros(terms, jnp.float32), None if sizes.groups == 1 else _only_heads((nothing,) * totals)
    if backend.on_cpu() and sizes.groups > 1:
        step = _where_rows_count(step)
    (sums, heads), (hidden, values) = _scan(step, start, xs)
    hidden = jax.tree.map(lambda x: x.reshape(sizes.rows, -1)[:rows], hidden)
    gradients = tuple(
        tuple(h._replace(hidden=r.hidden) for h, r in zip(*one, strict=True)) for one in zip(heads, hidden, strict=True)
    )
    return (sums, _joined(values)[:, :rows] if plan.by_row else None), gradients


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


class _Sizes(NamedTuple):
    """``groups`` of ``chunks`` of ``blocks`` of ``block`` rows."""

    groups: int
    chunks: int
    blocks: int
    block: int

    @property
    def rows(self) -> int:
        return self.groups * self.chunks * self.blocks * self.block


def _where_rows_count(step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """``step`` of the scan over groups, doing nothing for rows of which none carries loss, as the last of a batch.

    Its sums stay, and its rows' gradients and values are zeros. For a CPU, where to look costs nothing; on a GPU a
    branch waits for the host.
    """

    def nothing(carry, rows_here):
        results = jax.eval_shape(step, carry, rows_here)[1]
        return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)

    def either(carry, rows_here):
        *_, mask = rows_here
        return lax.cond(mask.any(), step, nothing, carry, rows_here)

    return either


def _sizes(plan: Plan, vocab: Vocab, sides: tuple[Side, ...], rows: int) -> _Sizes:
    """As even as can be, so that few rows are added."""
    columns = max(side.weight.shape[head.layout.index("v")] for side, head in zip(sides, plan.heads, strict=True))
    limit = plan.chunk_rows or _chunk_rows(columns, max(side.hidden.shape[1] for side in sides))
    groups = -(-rows // (limit * _group_chunks(limit, sides[0].hidden)))
    chunks = -(-rows // (groups * limit))
    chunk = -(-rows // (groups * chunks))
    blocks = -(-chunk // _block_rows(columns))
    block = -(-chunk // blocks)
    return _Sizes(groups, chunks, blocks, block + -block % vocab.parts)  # by_rows hands each device the same number


def _group(plan: Plan, vocab: Vocab, sides: tuple[Side, ...], fixed: Fixed, asked, heads, sizes: _Sizes):
    """Sums and values of a group, its gradients of hidden rows, and those of the heads added to ``heads``."""
    # Rows without loss may hold anything, an unwritten pool row too, and 0 · NaN would reach the products.
    sides = tuple(side._replace(hidden=jnp.where(fixed.mask[:, None], side.hidden, 0)) for side in sides)
    found, slopes, biases = _by_chunks(plan, vocab, sides, fixed, asked, sizes)
    if heads is None:  # the only group
        heads = ((None,) * len(sides),) * len(slopes)
    gradients = tuple(
        tuple(_gradient(*of_side) for of_side in zip(sides, plan.heads, *one, asked, strict=True))
        for one in zip(slopes, biases, heads, strict=True)
    )
    return found, gradients


def _by_chunks(plan: Plan, vocab: Vocab, sides: tuple[Side, ...], fixed: Fixed, asked, sizes: _Sizes):
    """Sums and values of a group; for each total and side the slopes [rows, V] in the dtype of the hidden rows, and
    those in the biases [V]."""

    def step(carry, rows_here):
        hidden, known, mask = rows_here
        raws = tuple(
            product(h, side.weight, head.layout) for h, side, head in zip(hidden, sides, plan.heads, strict=True)
        )
        raws = backend.again(*raws)  # or XLA takes the first function of the logits for the product's, and writes both
        biases = tuple(side.bias for side in sides)
        fixed_here = fixed._replace(known=known, mask=mask)
        (more, values), slopes, in_biases = _slopes(plan, vocab, raws, biases, fixed_here, asked, sizes)
        slopes = tuple(_where_given(lambda slope, h: slope.astype(h.dtype), one, hidden) for one in slopes)
        return jax.tree.map(jnp.add, carry, (more, in_biases)), (slopes, values)

    count, terms = fixed.mixture.shape
    xs = (tuple(side.hidden for side in sides), fixed.known, fixed.mask)
    start = jnp.zeros(terms, jnp.float32), _no_biases(tuple(side.bias for side in sides), count, asked)
    (sums, in_biases), (slopes, values) = _scan(step, start, jax.tree.map(lambda x: _parts(x, sizes.chunks), xs))
    slopes = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), slopes)
    return (sums, _joined(values) if plan.by_row else None), slopes, in_biases


def _slopes(plan: Plan, vocab: Vocab, raws, biases, fixed: Fixed, asked: tuple[Side, ...], sizes: _Sizes):
    """Sums and values of a chunk, and for each total and side the slopes in ``raws`` [rows, V] and in the biases [V].

    Slopes are None for a side of which no gradient is asked.
    """
    block, (count, terms) = sizes.block, fixed.mixture.shape
    wanted = tuple(bool(jax.tree.leaves(side)) for side in asked)
    # Slopes of the first total take the place of the logits, block by block; those of others need room of their own.
    first = tuple(raw if yes else None for raw, yes in zip(raws, wanted, strict=True))
    room = tuple(first if i == 0 else jax.tree.map(jnp.zeros_like, first) for i in range(count))

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

    begin = jnp.zeros(terms, jnp.float32), room, _no_biases(biases, count, asked)
    (sums, slopes, in_biases), values = _scan(step, begin, jnp.arange(sizes.blocks) * block)
    return (sums, _joined(values) if plan.by_row else None), slopes, in_biases


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


def _no_biases(biases, count: int, asked: tuple[Side, ...]):
    zeros = tuple(
        None if side.bias is None else jnp.zeros(bias.shape, jnp.float32)
        for bias, side in zip(biases, asked, strict=True)
    )
    return (zeros,) * count


def _gradient(
    side: Side, head: Head, slope: jax.Array | None, bias: jax.Array | None, so_far: Side | None, asked: Side
) -> Side:
    """The gradients of one side from the slope [rows, V] in its raw product; with ``so_far``, added to its head's."""
    if slope is None:
        return Side(None, None, None)
    hidden = None if asked.hidden is None else _product(f"nv,{head.layout}->nd", slope, side.weight)
    weight = None
    if asked.weight is not None and so_far is None:
        weight = _product(f"nd,nv->{head.layout}", side.hidden, slope, dtype=asked.weight)
    elif asked.weight is not None:
        weight = _add_outer(so_far.weight, side.hidden, slope, head.layout)
    if bias is not None and so_far is not None:
        bias += so_far.bias
    return Side(hidden, weight, bias)


def _add_outer(total: jax.Array, hidden: jax.Array, slope: jax.Array, layout: str) -> jax.Array:
    """``total`` + hiddenᵀ · slope.

    On a CPU in slices of the vocabulary, so that a product as large as the weight never exists. On a GPU, where a slice
    added in its place costs a copy of the whole, the product adds to the total by itself.
    """
    axis, columns = layout.index("v"), slope.shape[1]
    width = -(-columns // -(-total.size // SLICE)) if backend.on_cpu() else columns
    for start in range(0, columns, width):
        end = min(start + width, columns)
        part = _product(f"nd,nv->{layout}", hidden, lax.slice_in_dim(slope, start, end, axis=1))
        part += lax.slice_in_dim(total, start, end, axis=axis)
        total = lax.dynamic_update_slice_in_dim(total, part, start, axis)
    return total


def _product(spec: str, *operands: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.einsum(spec, *operands, preferred_element_type=dtype)


def _scan(step: Callable[..., tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """``lax.scan``, of one part without a loop."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return lax.scan(step, carry, xs)
    carry, ys = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


def _parts(x: jax.Array, count: int) -> jax.Array:
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])


def _joined(values: jax.Array) -> jax.Array:
    """[K, rows] of [parts, K, rows of a part]"""
    return jnp.moveaxis(values, 1, 0).reshape(values.shape[1], -1)


def _real(logits: jax.Array, size: int, vocab: Vocab) -> jax.Array:
    """Columns that only fill up the last device's part are no ids, for cross-entropy neither."""
    columns = logits.shape[-1]
    return logits if vocab.size(columns) == size else jnp.where(vocab.ids(columns) < size, logits, MASKED)


def _chunk_rows(columns: int, width: int) -> int:
    """Rows of a chunk: enough to outweigh reading a head, and no more.

    On a CPU as many as the wider model has dimensions do; few leave out more of the rows without loss. At most 832,
    which keep temporary memory at V = 151,936 under an eighth of whole logits' at 4,096 rows. Below a million logits
    the work for a chunk itself would show. Elsewhere logits of 256 MiB, in rows that fill a product's tiles.
    """
    if backend.on_cpu():
        return max(min(max(width, 256), 832), 2**20 // columns)
    return 256 * max(1, round(2**26 / columns / 256))


def _group_chunks(chunk: int, hidden: jax.Array) -> int:
    """Chunks of a group: one on a CPU; elsewhere as many as have slopes of the size of the head's float32 gradient, or
    4,096 rows, whose products outweigh adding to it."""
    rows = max(hidden.shape[1] * 4 // hidden.dtype.itemsize, 4096)
    return 1 if backend.on_cpu() else max(1, rows // chunk)


def _block_rows(columns: int) -> int:
    """Rows of a block of about 2 MB on a CPU, the cache of a core, and 512 MB elsewhere."""
    return max(1, (2**19 if backend.on_cpu() else 2**27) // columns)


def _where(asked: tuple[Side, ...], sides: tuple[Side, ...]) -> tuple[Side, ...]:
    return jax.tree.map(lambda yes, x: x if yes else None, asked, sides, is_leaf=lambda x: x is None)


def _only_heads(gradients):
    return tuple(tuple(side._replace(hidden=None) for side in one) for one in gradients)


def _only_hidden(gradients):
    return tuple(tuple(Side(side.hidden, None, None) for side in one) for one in gradients)
