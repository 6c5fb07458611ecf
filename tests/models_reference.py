"""Tiny random models made by transformers: what kdjax's decoders are compared with."""

from pathlib import Path

import numpy as np
import torch

from bridge.sglang_platform import mend_torchvision

mend_torchvision()

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
# What transformers is asked for, by the name tests use. Head sizes differ from hidden_size / heads where a family may.
FAMILIES = {
    "llama": dict(model_type="llama", head_dim=12),
    "llama-biased": dict(model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3-rope": dict(model_type="llama", rope_parameters=LLAMA3_ROPE, num_key_value_heads=4),
    "qwen2": dict(model_type="qwen2"),
    "qwen2-tied": dict(model_type="qwen2", tie_word_embeddings=True, num_key_value_heads=1),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "qwen3-tied": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True),
}


def reference(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A transformers model with every parameter random, norms and biases too: at 1 and 0 they would prove nothing."""
    torch.manual_seed(seed)
    arguments = {**SIZES, **FAMILIES[name], **changes}
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key:
                value.copy_(1 + 0.3 * torch.randn_like(value))
            elif key.endswith("bias"):
                value.copy_(0.3 * torch.randn_like(value))
    return model.to(dtype)


def save(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def logits(model, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        attention_mask = None if mask is None else torch.tensor(mask).long()
        return model(torch.tensor(tokens).long(), attention_mask=attention_mask).logits.float().numpy()


def bits(value) -> np.ndarray:
    """The bytes of an array or tensor, so that comparisons are exact and dtype-blind."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(value).view(np.uint8).reshape(-1)
