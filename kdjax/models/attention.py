"""Causal attention within segments: one function, the kernel chosen by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kdjax.arrays import AnyArray

IMPLEMENTATIONS = ("xla", "cudnn")
BLOCK, MOST_BLOCKS = 64, 8
UNSEEN = -1e30  # the score of a key that a query does not see


def causal_attention(
    q: Float[Array, "B S H head_dim"],
    k: Float[Array, "B S K head_dim"],
    v: Float[Array, "B S K head_dim"],
    segment_ids: Int[AnyArray, "B S"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "B S H head_dim"]:
    """Softmax attention where row t sees rows ≤ t of its own segment; the softmax runs in float32.

    Padding is segment 0 and attends to padding, so every row has something to attend to and no row is NaN.

    ``xla`` runs anywhere. It takes the queries in up to eight blocks, each against the keys up to its own end, which
    leaves out most of the scores that causality would mask, and makes a block's probabilities again for its gradient
    (FlashAttention-2, 2307.08691), so that a layer keeps nothing of the size of its scores.
    ``cudnn`` (FlashAttention, 2205.14135) needs a GPU and bfloat16 or float16 and never forms the scores. Segments
    reach it as a mask, [B, 1, S, S], which it reads for every head; without segments there is none.
    """
    if implementation == "cudnn":
        mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    return _blocked(q, k, v, segment_ids)


@jax.custom_vjp
def _blocked(q: Array, k: Array, v: Array, segment_ids: AnyArray | None) -> Array:
    """``causal_attention`` by plain operations. Inside, T queries of a block stand as [B, K, G, T, head_dim], their
    G = H / K heads by the key's head that they share, and keys as [B, K, S, head_dim]."""
    return _forward(q, k, v, segment_ids)[0]


def _forward(q: Array, k: Array, v: Array, segment_ids: AnyArray | None) -> tuple[Array, Any]:
    """The outputs [B, S, H, head_dim], and what the gradient needs: they, the arguments, and the logarithm of each
    query's sum of exponentials, float32 [B, K, G, S]."""
    queries, keys, values = _grouped(q, k), *_heads_first(k, v)
    outputs, normalisers = [], []
    for start, stop in _spans(q.shape[1]):
        scores = _scores(queries[..., start:stop, :], keys[:, :, :stop], segment_ids, start)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        # Divided after the product, a number a query and dimension is divided and not one a query and key.
        mixed = _product("bkgts,bksd->bkgtd", weights.astype(v.dtype), values[:, :, :stop])
        outputs.append((mixed / total).astype(q.dtype))
        normalisers.append((top + jnp.log(total))[..., 0])
    out = _ungrouped(jnp.concatenate(outputs, -2))
    return out, (q, k, v, segment_ids, out, jnp.concatenate(normalisers, -1))


def _backward(saved: Any, slope: Array) -> tuple[Array, Array, Array, None]:
    """The gradients of q, k and v from that of the outputs, each in the dtype of its own."""
    q, k, v, segment_ids, out, normalisers = saved
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    queries, keys, values, slopes = _grouped(q, k), *_heads_first(k, v), _grouped(slope, k)
    # Of a softmax, Σ p · dp over the keys, which is the product of an output with its slope.
    inner = _grouped((out.astype(jnp.float32) * slope.astype(jnp.float32)).sum(-1, keepdims=True), k)
    in_queries, in_keys, in_values = [], 0.0, 0.0
    for start, stop in _spans(length):
        here = slice(start, stop)
        query, out_slope = queries[..., here, :], slopes[..., here, :]
        scores = _scores(query, keys[:, :, :stop], segment_ids, start)
        p = jnp.exp(scores - normalisers[..., here, None])
        dp = _product("bkgtd,bksd->bkgts", out_slope, values[:, :, :stop])
        ds = (p * (dp - inner[..., here, :]) * scale).astype(q.dtype)
        in_queries.append(_product("bkgts,bksd->bkgtd", ds, keys[:, :, :stop]))
        in_keys += _over_queries(query, ds, length)
        in_values += _over_queries(out_slope, p.astype(v.dtype), length)
    in_queries = _ungrouped(jnp.concatenate(in_queries, -2))
    in_keys, in_values = (x.transpose(0, 3, 1, 2) for x in (in_keys, in_values))
    return in_queries.astype(q.dtype), in_keys.astype(k.dtype), in_values.astype(v.dtype), None


_blocked.defvjp(_forward, _backward)


def _spans(length: int) -> list[tuple[int, int]]:
    """Where blocks of queries start and stop."""
    block = max(BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _scores(query: Array, keys: Array, segment_ids: AnyArray | None, start: int) -> Float[Array, "B K G T stop"]:
    """Scaled products of the queries from ``start`` on with all keys up to their own end."""
    stop = keys.shape[-2]
    seen = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop))[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, start:stop, None] == segment_ids[:, None, :stop])
    scores = _product("bkgtd,bksd->bkgts", query, keys) * query.shape[-1] ** -0.5
    return jnp.where(seen[:, None, None], scores, UNSEEN)


def _over_queries(rows: Array, weights: Array, length: int) -> Float[Array, "B K head_dim length"]:
    """Σ over queries of rows [B, K, G, T, head_dim] by weights [B, K, G, T, stop], with zeros behind ``stop``.

    The rows are turned, a few dimensions wide, because XLA would turn the weights, as wide as there are keys.
    """
    stop = weights.shape[-1]
    turned = lax.optimization_barrier(rows.reshape(*rows.shape[:2], -1, rows.shape[-1]).swapaxes(-1, -2))
    summed = _product("bkdn,bkns->bkds", turned, weights.reshape(*weights.shape[:2], -1, stop))
    return jnp.pad(summed, ((0, 0), (0, 0), (0, 0), (0, length - stop)))


def _product(spec: str, *operands: Array) -> Array:
    return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)


def _grouped(x: Float[Array, "B S H D"], k: Float[Array, "B S K head_dim"]) -> Float[Array, "B K G S D"]:
    """The queries' heads by the key that they share."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)


def _ungrouped(x: Float[Array, "B K G S D"]) -> Float[Array, "B S H D"]:
    b, kv, g, s, d = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, s, kv * g, d)


def _heads_first(*arrays: Float[Array, "B S K head_dim"]) -> list[Float[Array, "B K S head_dim"]]:
    return [x.swapaxes(1, 2) for x in arrays]
