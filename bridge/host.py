"""One hosted engine with what no engine should have to care for: checks, weight versions, counts."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridge.checkpoint import read_facts
from bridge.engine import Completion, EngineSpec, Health, HostedEngine, Prefill, Sampling, check_ids
from bridge.errors import EngineError
from bridge.weight_sync import BucketSpec, Entry

TIED_HEAD = "lm_head.weight"


class Host:
    """The calls a server takes, by name. Methods without an underscore are callable from the other side."""

    def __init__(self, spec: EngineSpec):
        self._facts = read_facts(Path(spec.model))
        if spec.pool is not None and spec.pool.width != self._facts.width:
            raise ValueError(
                f"{spec.model} has hidden rows of {self._facts.width} numbers, the pool's have {spec.pool.width}"
            )
        self._spec = spec
        self._engine = _start(spec)
        self.max_tokens = self._engine.max_tokens
        self._began = time.monotonic()
        self._busy: tuple[str, float] | None = None
        self._version = 0
        self._arrived: set[str] | None = None  # names of a weight update under way, or one that broke off
        self._counts = {"prefill_prompts": 0, "prefill_tokens": 0, "prefill_rows": 0, "generated_tokens": 0}

    def call(self, method: str, args: tuple) -> Any:
        """run one call, known to `health` while it runs"""
        if self._arrived is not None and not method.startswith("weights_"):
            raise EngineError(
                f"{method}: the last weight update broke off after {len(self._arrived)} tensors; "
                f"send all weights again or restart the engine"
            )
        self._busy = (method, time.monotonic())
        try:
            return getattr(self, method)(*args)
        finally:
            self._busy = None

    def health(self) -> Health:
        busy, now = self._busy, time.monotonic()
        return Health(
            kind=self._spec.kind,
            model=self._spec.model,
            pid=os.getpid(),
            version=self._version,
            seconds=now - self._began,
            busy=None if busy is None else (busy[0], now - busy[1]),
            counts=dict(self._counts),
        )

    def prefill(self, prompts: Sequence[Prefill]) -> None:
        self._check([prompt.ids for prompt in prompts])
        self._engine.prefill(prompts)
        self._counts["prefill_prompts"] += len(prompts)
        self._counts["prefill_tokens"] += sum(len(prompt.ids) for prompt in prompts)
        self._counts["prefill_rows"] += sum(prompt.count for prompt in prompts)

    def score(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        self._check(prompts)
        return self._engine.score(prompts)

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> list[Completion]:
        self._check(prompts, room=sampling.max_new_tokens)
        if sampling.banned_ids:
            check_ids(np.array(sampling.banned_ids, np.int32), self._facts.vocab)
        completions = self._engine.generate(prompts, sampling, self._version)
        self._counts["generated_tokens"] += sum(len(completion.ids) for completion in completions)
        return completions

    def weights_begin(self) -> None:
        if not self._facts.tensors:
            raise EngineError(f"{self._spec.model} holds no safetensors: the names of its weights are unknown")
        self._arrived = set()
        self._engine.begin_weights()

    def weights_bucket(self, bucket: BucketSpec, entries: Sequence[Entry]) -> None:
        """load a bucket; every name and shape is compared with the checkpoint's before any weight changes"""
        if self._arrived is None:
            raise EngineError("a bucket of weights without weights_begin")
        for entry in entries:
            expected = self._facts.tensors.get(entry.name)
            if expected is None:
                raise EngineError(f"weight {entry.name}: no tensor of this name in {self._spec.model}")
            if expected != entry.shape:
                raise EngineError(f"weight {entry.name}: shape {entry.shape}, the model's is {expected}")
            if entry.name in self._arrived:
                raise EngineError(f"weight {entry.name}: sent twice")
            self._arrived.add(entry.name)
        self._engine.load_weights(bucket, entries)

    def weights_end(self, version: int) -> None:
        if self._arrived is None:
            raise EngineError("weights_end without weights_begin")
        expected = set(self._facts.tensors) - ({TIED_HEAD} if self._facts.tied else set())
        if missing := sorted(expected - self._arrived):
            raise EngineError(f"{len(missing)} weights did not arrive: {', '.join(missing[:4])}")
        self._engine.end_weights()
        self._version, self._arrived = version, None

    def sleep(self, tags: Sequence[str] | None) -> None:
        self._engine.sleep(tags)

    def wake(self, tags: Sequence[str] | None) -> None:
        self._engine.wake(tags)

    def close(self) -> None:
        self._engine.close()

    def _check(self, prompts: Sequence[np.ndarray], room: int = 0) -> None:
        for ids in prompts:
            check_ids(ids, self._facts.vocab, self.max_tokens - room)


def _start(spec: EngineSpec) -> HostedEngine:
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    if spec.kind == "sglang":
        from bridge.sglang_engine import SGLangEngine

        return SGLangEngine(spec)
    from bridge.transformers_engine import TransformersEngine

    return TransformersEngine(spec)
