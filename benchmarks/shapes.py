"""Configurations of models with random weights, as config.json has them."""

from __future__ import annotations

from typing import Any


def qwen3(**sizes: Any) -> dict[str, Any]:
    """A dense Qwen3 with its table of ids as head; ``sizes`` are the keys of config.json that make its shape."""
    return dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        **sizes,
    )
