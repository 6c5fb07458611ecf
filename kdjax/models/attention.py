"""Causal attention within segments: one function, the kernel chosen by name."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("xla", "cudnn")


def causal_attention(
    q: Float[Array, "B S H head_dim"],
    k: Float[Array, "B S K head_dim"],
    v: Float[Array, "B S K head_dim"],
    segment_ids: Int[Array, "B S"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "B S H head_dim"]:
    """Softmax attention where row t sees rows ≤ t of its own segment; the softmax runs in float32.

    Padding is segment 0 and attends to padding, so every row has something to attend to and no row is NaN.
    ``cudnn`` (2205.14135) needs a GPU and bfloat16 or float16; it never forms the [S, S] scores.
    """
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)
