"""Sums over rows of functions of logits, where the logits of all rows never exist.

Rows are taken a chunk at a time: a chunk's logits of both models, the functions, and, if a gradient will be asked for,
the slope in the logits and its products with hidden rows and weights, all before the next chunk. The backward pass
then only scales what is there; recomputing logits in it would cost 1.6 times the products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from kdjax.losses.head import Head, product
from kdjax.losses.vocab import MASKED, Vocab
from kdjax.sharding import BATCH_AXES, FSDP, TENSOR


class Side(NamedTuple):
    """What may carry a gradient, of student or teacher: hidden [N, D], weight [D, V] or [V, D], bias [V] or None."""

    hidden: Any
    weight: Any
    bias: Any


class Fixed(NamedTuple):
    """What never carries one."""

    labels: Any  # int32 [N] or None
    mask: Any  # bool [N]
    keep: Any  # bool [V] or None: the ids that divergences compare
    mixture: Any  # float32 [M, K]: M totals, each a mixture of the K sums
    params: Any  # traced parameters of the functions, by name


@dataclass(frozen=True)
class Plan:
    """The static part of a call."""

    values: Callable[..., tuple[jax.Array, ...]]
    """(student logits, teacher logits or None, labels, keep, vocab, params) -> K arrays of one float32 value a row."""
    heads: tuple[Head, ...]
    """Student's and, if there is one, teacher's head without arrays."""
    sizes: tuple[int, ...]
    """Their vocabularies."""
    chunk_rows: int | None
    mesh: Mesh | AbstractMesh | None


@partial(jax.jit, static_argnums=0)
def totals_and_sums(plan: Plan, sides: tuple[Side, ...], fixed: Fixed) -> tuple[jax.Array, jax.Array]:
    """float32 [M] totals, differentiable in ``sides``, and the [K] sums they are mixed from, which are not."""
    return _totals_and_sums(plan, sides, fixed)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _totals_and_sums(plan: Plan, sides: tuple[Side, ...], fixed: Fixed) -> tuple[jax.Array, jax.Array]:
    totals, sums, _ = _run(plan, sides, fixed, jax.tree.map(lambda _: False, sides))
    return totals, sums


def _forward(plan: Plan, sides, fixed):
    # Only what is being differentiated costs a product: not a frozen head, and nothing of the teacher's as a rule.
    asked = jax.tree.map(lambda x: x.perturbed, sides)
    sides, fixed = (jax.tree.map(lambda x: x.value, tree) for tree in (sides, fixed))
    totals, sums, gradients = _run(plan, sides, fixed, asked)
    return (totals, sums), (gradients, jax.tree.map(lambda x: jnp.empty(0, x.dtype), sides))


def _backward(plan: Plan, saved, cotangents):
    gradients, dtypes = saved
    slope = cotangents[0]
    if isinstance(slope, SymbolicZero):
        return None, None
    mixed = jax.tree.map(lambda *g: sum(s * x.astype(jnp.float32) for s, x in zip(slope, g, strict=True)), *gradients)
    cast = jax.tree.map(lambda like, g: None if g is None else g.astype(like.dtype), dtypes, mixed)
    return cast, None


_totals_and_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(plan: Plan, sides: tuple[Side, ...], fixed: Fixed, asked: tuple[Side, ...]):
    """Totals [M], sums [K], and for each total the gradients of ``sides`` that are ``asked`` for, None elsewhere."""
    sides = tuple(side._replace(weight=side.weight.astype(side.hidden.dtype)) for side in sides)
    batch = _axes(plan.mesh, BATCH_AXES)
    tensor = _axes(plan.mesh, (TENSOR,))
    if not batch and not tensor:
        sums, gradients = _scan(plan, Vocab(), sides, fixed, asked)
    else:
        sums, gradients = _run_sharded(plan, batch, tensor, sides, fixed, asked)
    return _mix(fixed.mixture, sums), sums, gradients


def _run_sharded(plan: Plan, batch, tensor, sides, fixed, asked):
    mesh = plan.mesh
    rows = fixed.mask.shape[0]
    row_shards = _size(mesh, batch)
    vocab_shards = _size(mesh, tensor)
    # Equal widths line up the columns of both heads on every device; `_logits` masks what is added here.
    columns = max(plan.sizes) + -max(plan.sizes) % vocab_shards if tensor else None
    sides = tuple(
        Side(
            _pad(side.hidden, 0, rows + -rows % row_shards),
            _pad(side.weight, head.layout.index("v"), columns),
            _pad(side.bias, 0, columns),
        )
        for side, head in zip(sides, plan.heads, strict=True)
    )
    keep = fixed.keep
    if tensor and keep is None and columns != max(plan.sizes):
        keep = jnp.ones(min(plan.sizes), bool)
    fixed = fixed._replace(
        labels=_pad(fixed.labels, 0, rows + -rows % row_shards),
        mask=_pad(fixed.mask, 0, rows + -rows % row_shards),
        keep=_pad(keep, 0, columns),
    )

    # Asking for the whole width here gathers a head that is split over fsdp once, before the loop over chunks.
    vocab_spec = P(tensor or None)
    side_specs, gradient_specs, scattered = [], [], []
    for side, head in zip(sides, plan.heads, strict=True):
        at_v = head.layout.index("v")
        weight_spec = [None, None]
        weight_spec[at_v] = tensor or None
        side_specs.append(Side(P(batch or None), P(*weight_spec), vocab_spec))
        width = side.weight.shape[1 - at_v]
        scatter = FSDP in batch and width % mesh.shape[FSDP] == 0
        scattered.append(1 - at_v if scatter else None)
        if scatter:
            weight_spec[1 - at_v] = FSDP
        gradient_specs.append(Side(P(batch or None), P(*weight_spec), vocab_spec))
    row_spec = P(batch or None)
    fixed_specs = Fixed(row_spec, row_spec, vocab_spec, P(), jax.tree.map(lambda _: P(), fixed.params))
    operands, structure = jax.tree.flatten((sides, fixed))
    in_specs = _specs_of_leaves((sides, fixed), (tuple(side_specs), fixed_specs))
    totals = fixed.mixture.shape[0]
    wanted = tuple(jax.tree.map(lambda yes: yes or None, asked) for _ in range(totals))
    leaves, gradient_structure = jax.tree.flatten(wanted)
    out_specs = _specs_of_leaves(wanted, (tuple(gradient_specs),) * totals)

    def shard(*operands):
        sides, fixed = jax.tree.unflatten(structure, operands)
        sums, gradients = _scan(plan, Vocab(tensor[0] if tensor else None), sides, fixed, asked)
        reduced = tuple(
            tuple(_reduce(side, batch, tensor, at) for side, at in zip(one, scattered, strict=True))
            for one in gradients
        )
        return lax.psum(sums, batch) if batch else sums, tuple(jax.tree.leaves(reduced))

    sums, flat = jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=(P(), out_specs), check_vma=False)(
        *operands
    )
    gradients = jax.tree.unflatten(gradient_structure, flat)
    cut = tuple(
        tuple(
            Side(
                None if side.hidden is None else side.hidden[:rows],
                None if side.weight is None else lax.slice_in_dim(side.weight, 0, size, axis=head.layout.index("v")),
                None if side.bias is None else side.bias[:size],
            )
            for side, head, size in zip(one, plan.heads, plan.sizes, strict=True)
        )
        for one in gradients
    )
    return sums, cut


def _scan(plan: Plan, vocab: Vocab, sides: tuple[Side, ...], fixed: Fixed, asked: tuple[Side, ...]):
    """Sums [K] and gradients over this device's rows, and for weight and bias over its columns."""
    rows = fixed.mask.shape[0]
    columns = [side.weight.shape[head.layout.index("v")] for side, head in zip(sides, plan.heads, strict=True)]
    chunk = plan.chunk_rows or _chunk_rows(max(columns))
    count = -(-rows // chunk)
    chunk = -(-rows // count)
    if vocab.axis is not None:
        chunk += -chunk % lax.axis_size(vocab.axis)
    whole = jax.tree.map(lambda x: _pad(x, 0, count * chunk), ([s.hidden for s in sides], fixed.labels, fixed.mask))
    blocks = jax.tree.map(lambda x: x.reshape(count, chunk, *x.shape[1:]), whole)
    slopes = [any(side) for side in (jax.tree.map(bool, one) for one in asked)]

    def block(carry, block):
        sums, heads = carry
        hiddens, labels, mask = block
        # Rows without loss may hold anything, an unwritten pool row too, and 0 · NaN would reach the products.
        hiddens = [jnp.where(mask[:, None], h, 0) for h in hiddens]
        raws = [product(h, side.weight, head.layout) for h, side, head in zip(hiddens, sides, plan.heads, strict=True)]

        def mixed(differentiated):
            logits = []
            for i, (side, head, size) in enumerate(zip(sides, plan.heads, plan.sizes, strict=True)):
                raw, bias = differentiated.get(i, (raws[i], side.bias))
                logits.append(_real(head.finish(raw, bias), size, vocab))
            student, teacher = logits if len(logits) == 2 else (logits[0], None)
            values = plan.values(student, teacher, labels, fixed.keep, vocab, fixed.params)
            sums = jnp.stack([jnp.where(mask, v, 0).sum() for v in values])
            return _mix(fixed.mixture, sums), sums

        differentiated = {i: (raws[i], sides[i].bias) for i, slope in enumerate(slopes) if slope}
        if not differentiated:
            return (sums + mixed({})[1], heads), ()
        totals, pull, more = jax.vjp(mixed, differentiated, has_aux=True)
        rows_out, heads_out = [], []
        for one, before in zip(jnp.eye(len(totals), dtype=totals.dtype), heads, strict=True):
            (slope,) = pull(one)
            row_gradients, head_gradients = [], []
            for i, (side, head) in enumerate(zip(sides, plan.heads, strict=True)):
                if not slopes[i]:
                    row_gradients.append(None)
                    head_gradients.append((None, None))
                    continue
                z = slope[i][0].astype(side.hidden.dtype)
                row_gradients.append(
                    jnp.einsum(f"nv,{head.layout}->nd", z, side.weight, preferred_element_type=jnp.float32)
                    if asked[i].hidden
                    else None
                )
                weight, bias = before[i]
                if weight is not None:
                    weight = weight + jnp.einsum(
                        f"nd,nv->{head.layout}", hiddens[i], z, preferred_element_type=jnp.float32
                    )
                if bias is not None:
                    bias = bias + slope[i][1]
                head_gradients.append((weight, bias))
            rows_out.append(row_gradients)
            heads_out.append(head_gradients)
        return (sums + more, heads_out), rows_out

    heads = [
        [
            (
                jnp.zeros(side.weight.shape, jnp.float32) if one.weight else None,
                jnp.zeros(side.bias.shape, jnp.float32) if one.bias else None,
            )
            for side, one in zip(sides, asked, strict=True)
        ]
        for _ in range(fixed.mixture.shape[0])
    ]
    (sums, heads), hidden = lax.scan(block, (jnp.zeros(fixed.mixture.shape[1]), heads), blocks)
    hidden = jax.tree.map(lambda x: x.reshape(count * chunk, -1)[:rows], hidden)
    if not any(slopes):
        return sums, ()
    return sums, tuple(
        tuple(Side(h, weight, bias) for h, (weight, bias) in zip(*one, strict=True))
        for one in zip(hidden, heads, strict=True)
    )


def _real(logits: jax.Array, size: int, vocab: Vocab) -> jax.Array:
    columns = logits.shape[-1]
    return logits if vocab.size(columns) == size else jnp.where(vocab.ids(columns) < size, logits, MASKED)


def _mix(mixture: jax.Array, sums: jax.Array) -> jax.Array:
    return (mixture * sums).sum(-1)  # not a product: that may round to fewer bits on an accelerator


def _reduce(side: Side, batch: tuple[str, ...], tensor: tuple[str, ...], scattered: int | None) -> Side:
    """Add up over devices, once: hidden gradients over the vocabulary, weight and bias over the rows."""
    hidden, weight, bias = side
    if hidden is not None and tensor:
        hidden = lax.psum(hidden, tensor)
    if weight is not None and scattered is not None:
        weight = lax.psum_scatter(weight, FSDP, scatter_dimension=scattered, tiled=True)
    if weight is not None:
        rest = tuple(axis for axis in batch if scattered is None or axis != FSDP)
        weight = lax.psum(weight, rest) if rest else weight
    if bias is not None and batch:
        bias = lax.psum(bias, batch)
    return Side(hidden, weight, bias)


def _chunk_rows(columns: int) -> int:
    """Rows of a chunk: enough to outweigh the traffic of adding a weight-sized gradient after each, and no more.

    On a CPU 256 rows took 0.65 of the time of unchunked logits at V = 4,096 and 0.95 at V = 65,536; an accelerator does
    more arithmetic per byte. Below a million logits the work for a chunk itself would show.
    """
    return max(256 if jax.default_backend() == "cpu" else 1024, 2**20 // columns)


def _axes(mesh: Mesh | AbstractMesh | None, names: tuple[str, ...]) -> tuple[str, ...]:
    return () if mesh is None else tuple(name for name in names if mesh.shape.get(name, 1) > 1)


def _size(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def _pad(x: jax.Array | None, axis: int, size: int | None) -> jax.Array | None:
    if x is None or size is None or x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])


def _specs_of_leaves(tree: Any, specs: Any) -> tuple[P, ...]:
    """The spec of each leaf of ``tree``; its absent parts (None) have none."""
    return tuple(
        spec
        for leaf, spec in zip(
            jax.tree.leaves(tree, is_leaf=lambda x: x is None),
            jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
            strict=True,
        )
        if leaf is not None
    )
