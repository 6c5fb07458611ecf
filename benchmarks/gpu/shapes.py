"""The models that are measured: Qwen3's dense shapes with random weights, and one small enough for a CPU."""

from __future__ import annotations

from typing import Any

from benchmarks.shapes import qwen3

QWEN3 = {
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "1.7B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
}
TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
VOCABULARY = 151_936


def shape(size: str, toy: bool) -> dict[str, Any]:
    """config.json of the Qwen3 of this size."""
    return qwen3(
        vocab_size=4096 if toy else VOCABULARY,
        num_key_value_heads=2 if toy else 8,
        head_dim=16 if toy else 128,
        max_position_embeddings=8192,
        **(TOY if toy else QWEN3[size]),
    )
