"""Tiny random Qwen3 models and what plain transformers says about them: the reference for engines."""

from pathlib import Path

import numpy as np
import torch

from bridge.sglang_platform import mend_torchvision

mend_torchvision()

from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

VOCAB, WIDTH = 384, 64


def save_model(folder: Path, seed: int) -> Path:
    """a two-layer Qwen3 with spread-out logits, saved as a HF folder; id 1 ends a text"""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


class Reference:
    """one prompt at a time through plain transformers, float32"""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def hidden(self, ids: np.ndarray) -> np.ndarray:
        """[T, WIDTH] after the final norm"""
        return self.model.model(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0].numpy()

    @torch.no_grad()
    def logprobs(self, ids: np.ndarray) -> np.ndarray:
        """[T, VOCAB], log-softmax in float64"""
        return self.model(torch.tensor(ids[None].astype(np.int64))).logits[0].double().log_softmax(-1).numpy()

    def greedy(self, ids: np.ndarray, steps: int, ends: set[int], banned: tuple[int, ...] = ()) -> list[int]:
        """the most likely continuation, recomputed from the start for every token"""
        out: list[int] = []
        while len(out) < steps and not (out and out[-1] in ends):
            logprobs = self.logprobs(np.concatenate([ids, np.array(out, np.int32)]))[-1]
            logprobs[list(banned)] = -np.inf
            out.append(int(logprobs.argmax()))
        return out

    def weights(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.model.state_dict().items()}


def random_prompts(rng: np.random.Generator, lengths: list[int]) -> list[np.ndarray]:
    return [rng.integers(2, VOCAB, length).astype(np.int32) for length in lengths]


def random_spans(rng: np.random.Generator, length: int) -> tuple[tuple[int, int], ...]:
    """one to three ascending, disjoint, non-empty ranges in [0, length)"""
    cuts = np.sort(rng.choice(length + 1, size=min(2 * int(rng.integers(1, 4)), (length + 1) // 2 * 2), replace=False))
    return tuple((int(start), int(stop)) for start, stop in cuts.reshape(-1, 2))
