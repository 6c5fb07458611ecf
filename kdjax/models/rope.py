"""Rotary position embedding: which angle a position turns each pair of dimensions by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kdjax.arrays import AnyArray
from kdjax.models.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2], in the order of operations that the published checkpoints were trained with.

    "llama3" (Llama 3.1): wavelengths longer than the original context are divided by ``factor``, short ones stay, and
    those between are mixed linearly in the number of turns that fit the original context.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.scaling == "default":
        return frequency
    turns = rope.original_max_position_embeddings * frequency / (2 * np.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return ((1 - keep) * frequency / rope.factor + keep * frequency).astype(np.float32)


def angles(
    positions: Int[AnyArray, "B S"], rope: Rope, head_dim: int
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """Cosine and sine, float32: bfloat16 cannot tell neighbouring positions apart beyond 256."""
    turned = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(turned), jnp.sin(turned)


def rotate(
    x: Float[Array, "B S heads head_dim"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]
) -> Float[Array, "B S heads head_dim"]:
    """Turn dimension i with dimension i + head_dim/2 (the pairing of HF checkpoints), in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def segment_positions(segment_ids: Int[AnyArray, "B S"]) -> Int[Array, "B S"]:
    """Positions that restart at 0 wherever the segment changes."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
