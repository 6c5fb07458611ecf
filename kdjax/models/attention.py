"""Causal attention within segments: one function, the kernel chosen by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.arrays import AnyArray

IMPLEMENTATIONS = ("xla", "cudnn")
BLOCK, MOST_BLOCKS = 128, 4


def causal_attention(
    q: Float[Array, "B S H head_dim"],
    k: Float[Array, "B S K head_dim"],
    v: Float[Array, "B S K head_dim"],
    segment_ids: Int[AnyArray, "B S"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "B S H head_dim"]:
    """Softmax attention where row t sees rows ≤ t of its own segment; the softmax runs in float32.

    Padding is segment 0 and attends to padding, so every row has something to attend to and no row is NaN.

    ``xla`` runs anywhere. It takes the queries in a few blocks, each against the keys up to its own end, which leaves
    out most of the scores that causality would mask: on two CPU cores half the time of one [S, S] block at S = 512.
    ``cudnn`` (FlashAttention, 2205.14135) needs a GPU and bfloat16 or float16 and never forms the scores. Segments
    reach it as a mask, [B, 1, S, S], which it reads for every head; without segments there is none.
    """
    if implementation == "cudnn":
        mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    length = q.shape[1]
    block = max(BLOCK, -(-length // MOST_BLOCKS))
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        mask = _mask(start, stop, segment_ids)
        parts.append(
            jax.nn.dot_product_attention(q[:, start:stop], k[:, :stop], v[:, :stop], mask=mask, implementation="xla")
        )
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _mask(start: int, stop: int, segment_ids: Int[AnyArray, "B S"] | None) -> Bool[Array, "#B 1 queries keys"]:
    """Which keys [0, stop) the queries [start, stop) see."""
    seen = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop))[None, None]
    if segment_ids is None:
        return seen
    return seen & (segment_ids[:, start:stop, None] == segment_ids[:, None, :stop])[:, None]
