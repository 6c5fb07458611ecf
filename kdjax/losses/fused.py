"""Totals over all rows as one differentiable operation, on one device or on a mesh.

The gradient is formed in the forward pass, together with the value, and the backward pass scales it; recomputing the
logits there would cost 1.6 times the products. Without differentiation no gradient is formed.

On a mesh each data shard chunks its own rows. A head that is split over "fsdp" is gathered once, before the loop; the
vocabulary stays split over "tensor", and the loop exchanges a few numbers a row; the gradients of head and hidden rows
are added up over devices once, after the loop.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, PartitionSpec as P

from kdjax.head import Head
from kdjax.losses.chunks import Fixed, Plan, Side, mix, resize, sums_and_gradients
from kdjax.losses.vocab import WHOLE, Vocab
from kdjax.sharding import BATCH_AXES, FSDP, TENSOR


@partial(jax.jit, static_argnums=0)
def totals_and_sums(plan: Plan, sides: tuple[Side, ...], fixed: Fixed) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """float32 [M] totals, differentiable in ``sides``, and what they are mixed from, which is not.

    That is the [K] sums and, if ``plan.by_row``, the [K, N] values that are summed, else None.
    """
    return _totals_and_sums(plan, sides, fixed)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _totals_and_sums(plan: Plan, sides: tuple[Side, ...], fixed: Fixed) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    found, _ = _run(plan, sides, fixed, jax.tree.map(lambda _: None, sides))
    return mix(fixed.mixture, found[0]), found


def _forward(plan: Plan, sides, fixed):
    # Only what is being differentiated costs a product: not a frozen head, and as a rule nothing of the teacher's.
    asked = jax.tree.map(lambda x: _summed_in(x.value.dtype) if x.perturbed else None, sides)
    sides, fixed = (jax.tree.map(lambda x: x.value, tree) for tree in (sides, fixed))
    found, gradients = _run(plan, sides, fixed, asked)
    likes = jax.tree.map(lambda x: jnp.empty(0, x.dtype), sides)
    return (mix(fixed.mixture, found[0]), found), (gradients, likes)


def _summed_in(dtype: Any) -> Any:
    """What a sum over rows may be written in before it is scaled: float16 would overflow."""
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


def _backward(plan: Plan, saved, cotangents):
    gradients, likes = saved
    scales, _ = cotangents
    if isinstance(scales, SymbolicZero):
        return None, None

    def scaled(like: jax.Array, *each: jax.Array | None) -> jax.Array | None:
        if each[0] is None:
            return None
        return sum(scale * gradient for scale, gradient in zip(scales, each, strict=True)).astype(like.dtype)

    return jax.tree.map(scaled, likes, *gradients), None


_totals_and_sums.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.named_scope("fused_loss")
def _run(plan: Plan, sides: tuple[Side, ...], fixed: Fixed, asked: tuple[Side, ...]):
    # The products are taken in the dtype of the activations; a cast before the head is gathered moves fewer bytes.
    sides = tuple(side._replace(weight=side.weight.astype(side.hidden.dtype)) for side in sides)
    batch, tensor = (_split_axes(plan, axes) for axes in (BATCH_AXES, (TENSOR,)))
    if not batch and not tensor:
        return sums_and_gradients(plan, WHOLE, sides, fixed, asked)
    return _run_sharded(plan, batch, tensor, sides, fixed, asked)


def _run_sharded(plan: Plan, batch: tuple[str, ...], tensor: tuple[str, ...], sides, fixed: Fixed, asked):
    mesh, rows, sizes = plan.mesh, fixed.mask.shape[0], plan.sizes
    even_rows = _round_up(rows, prod(mesh.shape[axis] for axis in batch))
    columns, keep = sizes, fixed.keep
    if tensor:
        # Equal widths line up the columns of both heads on every device.
        columns = (_round_up(max(sizes), mesh.shape[TENSOR]),) * len(sizes)
        if keep is None and min(sizes) < columns[0]:
            keep = jnp.ones(min(sizes), bool)
        keep = resize(keep, 0, columns[0])
    known, mask = jax.tree.map(lambda x: resize(x, 0, even_rows), (fixed.known, fixed.mask))
    fixed = fixed._replace(known=known, mask=mask, keep=keep)
    sides = _resized(plan, sides, even_rows, columns)

    scattered = [_divides(mesh, side, head) for side, head in zip(sides, plan.heads, strict=True)]
    over_rows, over_vocab = P(batch or None), P(tensor or None)
    side_specs = tuple(Side(over_rows, _weight_spec(head, tensor), over_vocab) for head in plan.heads)
    of_rows, everywhere = jax.tree.map(lambda _: over_rows, known), jax.tree.map(lambda _: P(), fixed.params)
    fixed_specs = Fixed(of_rows, over_rows, over_vocab, P(), everywhere)
    gradient_specs = tuple(
        Side(over_rows, _weight_spec(head, tensor, FSDP if scatter else None), over_vocab)
        for head, scatter in zip(plan.heads, scattered, strict=True)
    )

    def shard(sides, fixed):
        in_float32 = jax.tree.map(lambda _: jnp.dtype(jnp.float32), asked)  # they are added up over devices
        (sums, values), gradients = sums_and_gradients(plan, Vocab(*tensor), sides, fixed, in_float32)
        reduced = tuple(
            tuple(_added_up(*each, batch, tensor) for each in zip(one, plan.heads, scattered, strict=True))
            for one in gradients
        )
        return (_psum(sums, batch), values), reduced

    in_specs = _present((sides, fixed), (side_specs, fixed_specs))
    by_row = P(None, *over_rows) if plan.by_row else None
    out_specs = (P(), by_row), tuple(_present(asked, gradient_specs) for _ in range(fixed.mixture.shape[0]))
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    (sums, values), gradients = mapped(sides, fixed)
    values = values[:, :rows] if plan.by_row else None
    return (sums, values), tuple(_resized(plan, one, rows, sizes) for one in gradients)


def _added_up(side: Side, head: Head, scatter: bool, batch: tuple[str, ...], tensor: tuple[str, ...]) -> Side:
    """Gradients of hidden rows added up over the vocabulary, those of weight and bias over the rows."""
    hidden, weight, bias = side
    over = batch
    if weight is not None and scatter:
        weight = lax.psum_scatter(weight, FSDP, scatter_dimension=head.layout.index("d"), tiled=True)
        over = tuple(axis for axis in batch if axis != FSDP)
    return Side(_psum(hidden, tensor), _psum(weight, over), _psum(bias, batch))


def _psum(x: jax.Array | None, axes: tuple[str, ...]) -> jax.Array | None:
    return x if x is None or not axes else lax.psum(x, axes)


def _split_axes(plan: Plan, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` that really split something; an axis of a shard_map around the call does so already."""
    if plan.mesh is None:
        return ()
    kinds = dict(zip(plan.mesh.axis_names, plan.mesh.axis_types, strict=True))
    return tuple(name for name in names if plan.mesh.shape.get(name, 1) > 1 and kinds[name] is not AxisType.Manual)


def _divides(mesh: Any, side: Side, head: Head) -> bool:
    """Whether the weight's gradient can leave in fsdp pieces, as the weight itself is usually held."""
    fsdp = mesh.shape.get(FSDP, 1)
    return fsdp > 1 and side.weight.shape[head.layout.index("d")] % fsdp == 0


def _weight_spec(head: Head, tensor: tuple[str, ...], width: str | None = None) -> P:
    axes = {"d": width, "v": tensor or None}
    return P(*(axes[dimension] for dimension in head.layout))


def _resized(plan: Plan, sides: tuple[Side, ...], rows: int, columns: tuple[int, ...]) -> tuple[Side, ...]:
    return tuple(
        Side(
            resize(side.hidden, 0, rows),
            resize(side.weight, head.layout.index("v"), size),
            resize(side.bias, 0, size),
        )
        for side, head, size in zip(sides, plan.heads, columns, strict=True)
    )


def _round_up(size: int, multiple: int) -> int:
    return size + -size % multiple


def _present(tree: Any, specs: Any) -> Any:
    """``specs`` without those of what is absent (None) in ``tree``."""
    return jax.tree.map(lambda x, spec: None if x is None else spec, tree, specs, is_leaf=lambda x: x is None)
