"""The same protocol on plain transformers: for what SGLang cannot run, and the reference in tests.

Each prompt runs alone, so a row never depends on its company and two runs give the same bits. It is slower than SGLang.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from bridge.bucket_tensors import load_bucket
from bridge.checkpoint import read_facts
from bridge.cuda import gpus
from bridge.engine import Completion, EngineSpec, Prefill, Sampling
from bridge.pool_rows import PoolRows
from bridge.weight_sync import BucketSpec, Entry


class TransformersEngine:
    """A HF causal language model, run prompt by prompt."""

    def __init__(self, spec: EngineSpec):
        facts = read_facts(Path(spec.model))
        self._device = torch.device(spec.device)
        self._model = AutoModelForCausalLM.from_pretrained(
            spec.model, dtype=getattr(torch, spec.dtype), **dict(spec.options)
        )
        self._model.eval().requires_grad_(False).to(self._device)
        self._eos_ids = facts.eos_ids
        self.max_tokens = int(self._model.config.get_text_config().max_position_embeddings)
        if spec.pool is not None:
            here = gpus()[torch.cuda.current_device()] if self._device.type == "cuda" else ""
            self._rows = PoolRows(spec.pool, ranks=[here])

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prefill]) -> None:
        for prompt in prompts:
            hidden = self._model.base_model(self._ids(prompt.ids), use_cache=False).last_hidden_state[0]
            row = prompt.row
            for start, stop in prompt.spans:
                self._rows.write(row, hidden[start:stop])
                row += stop - start
        self._rows.finish()

    @torch.inference_mode()
    def score(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        scores = []
        for prompt in prompts:
            ids = self._ids(prompt)
            logprobs = self._model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            scores.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu().numpy())
        return scores

    @torch.inference_mode()
    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling, version: int) -> list[Completion]:
        wanted = [prompt for prompt in prompts for _ in range(sampling.n)]
        seeds = sampling.seeds_for(len(prompts))
        return [self._complete(ids, sampling, seed, version) for ids, seed in zip(wanted, seeds, strict=True)]

    def begin_weights(self) -> None:
        self._state = self._model.state_dict()

    def load_weights(self, bucket: BucketSpec, entries: Sequence[Entry]) -> None:
        def copy(tensors: list[tuple[str, torch.Tensor]]) -> None:
            for name, tensor in tensors:
                self._state[name].copy_(tensor)

        load_bucket(bucket, entries, copy)

    def end_weights(self) -> None:
        del self._state

    def sleep(self, tags: Sequence[str] | None) -> None:
        if tags is None or "weights" in tags:
            self._model.to("cpu")
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # else torch keeps the memory for itself

    def wake(self, tags: Sequence[str] | None) -> None:
        if tags is None or "weights" in tags:
            self._model.to(self._device)

    def close(self) -> None:
        del self._model

    def _ids(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64))[None].to(self._device)

    def _complete(self, prompt: np.ndarray, sampling: Sampling, seed: int, version: int) -> Completion:
        generator = torch.Generator(self._device).manual_seed(seed)
        ends = self._eos_ids | set(sampling.stop_ids)
        banned = torch.tensor(sampling.banned_ids, dtype=torch.long, device=self._device)
        cache, step = DynamicCache(config=self._model.config), self._ids(prompt)
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < sampling.max_new_tokens and not (ids and ids[-1] in ends):
            logits = self._model(step, past_key_values=cache, use_cache=True).logits[0, -1].float()
            logits[banned] = float("-inf")
            chosen, scaled = _sample(logits, sampling, generator)
            ids.append(chosen)
            logprobs.append(float(scaled.log_softmax(-1)[chosen]))
            step = torch.tensor([[chosen]], device=self._device)
        return Completion(
            ids=np.array(ids, np.int32),
            logprobs=np.array(logprobs, np.float32),
            finish_reason="stop" if ids[-1] in ends else "length",
            version=version,
        )


def _sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, torch.Tensor]:
    """an id, and the logits at the sampling temperature"""
    if sampling.temperature == 0:
        return int(logits.argmax()), logits
    scaled = logits / sampling.temperature
    probabilities, order = scaled.softmax(-1).sort(descending=True)
    kept = probabilities.cumsum(-1) - probabilities <= sampling.top_p
    if sampling.top_k:
        kept[sampling.top_k :] = False
    return int(order[torch.multinomial(probabilities * kept, 1, generator=generator)]), scaled
