"""SGLang's engine behind our protocol: request ids out, rows in the pool; failures it returns as values are raised."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoint import read_facts
from bridge.cuda import gpus, memory
from bridge.engine import Completion, EngineSpec, Prefill, Sampling
from bridge.errors import EngineError
from bridge.hidden_pool import PoolSpec
from bridge.leaving import child_failed
from bridge.sglang_hook import request_id
from bridge.sglang_weights import LOADER, described
from bridge.weight_sync import BucketSpec, Entry

IDLE_SECONDS = 30.0
PLATFORM_GROUP, PLATFORM = "sglang.srt.platforms", "kdjax_cpu"

# For any device: ids in and out only; a cached prefix would skip its rows; an idle scheduler must not spin on a core.
DEFAULTS = {
    "skip_tokenizer_init": True,
    "disable_radix_cache": True,
    "sleep_on_idle": True,
    "log_level": "warning",
    "custom_sigquit_handler": child_failed,
}
# A CPU has no free memory to profile, so the KV cache is given a size; none of SGLang's kernels are there.
CPU_DEFAULTS = {"max_total_tokens": 32768, "max_running_requests": 64, "mem_fraction_static": 0.4}
# Replayed graphs call no hooks.
CUDA_DEFAULTS = {"disable_prefill_cuda_graph": True}


class SGLangEngine:
    """One `sglang.Engine` with its scheduler processes. Lives in a server process: see `bridge.server` for why."""

    def __init__(self, spec: EngineSpec):
        """starts the engine; raises EngineError or SGLang's own error where it cannot start"""
        if spec.device == "cpu":
            if not entry_points(group=PLATFORM_GROUP, name=PLATFORM):
                raise EngineError(
                    "SGLang on a CPU needs this package's platform plugin, which is found by its installed metadata: "
                    "pip install --no-deps -e . in the repository"
                )
            os.environ["SGLANG_PLATFORM"] = PLATFORM
        from sglang.srt.entrypoints.engine import Engine

        class TokenEngine(Engine):
            run_detokenizer_process_func = staticmethod(no_detokenizer)

        self._engine = TokenEngine(
            **DEFAULTS
            | (CPU_DEFAULTS if spec.device == "cpu" else CUDA_DEFAULTS)
            | {"model_path": spec.model, "dtype": spec.dtype, "device": spec.device, "random_seed": spec.seed}
            | (_memory(spec) if spec.device == "cuda" else {})
            | {"forward_hooks": _hooks(spec.pool), "custom_weight_loader": [LOADER]}
            | dict(spec.options)
        )
        self.max_tokens = int(self._engine.get_server_info()["max_req_input_len"]) - 1
        # With the first request SGLang installs a handler that tries py-spy and core dumps for seconds before it goes.
        signal.signal(signal.SIGQUIT, child_failed)
        # Flushing its cache, as after each weight update, SGLang collects garbage on a CPU: through all that was ever
        # imported, unless that is set aside (half a second against two milliseconds).
        self._engine.loop.run_until_complete(self._engine.tokenizer_manager.freeze_gc())
        self._spec, self._replicas = spec, replicas(spec)
        self._eos_ids = read_facts(Path(spec.model)).eos_ids
        self._calls = 0
        self._updating = False

    def prefill(self, prompts: Sequence[Prefill]) -> None:
        self._calls += 1
        rids = [request_id(self._calls, index, p.row, p.spans) for index, p in enumerate(prompts)]
        nothing = {"max_new_tokens": 0, "temperature": 0.0}
        if not self._replicas:
            self._request([prompt.ids for prompt in prompts], nothing, rid=rids)
            return
        shares: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            shares.setdefault(self._replicas[prompt.row // self._spec.pool.part_rows], []).append(index)

        async def ask() -> list[list[dict[str, Any]]]:
            asked = (
                self._engine.async_generate(
                    input_ids=[prompts[index].ids.tolist() for index in share],
                    sampling_params=nothing,
                    rid=[rids[index] for index in share],
                    routed_dp_rank=replica,
                )
                for replica, share in shares.items()
            )
            return await asyncio.gather(*asked)

        for share, answers in zip(shares.values(), self._engine.loop.run_until_complete(ask()), strict=True):
            _raise_given_up(zip(share, answers, strict=True))

    def score(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        answers = self._request(
            prompts, {"max_new_tokens": 0, "temperature": 0.0}, return_logprob=True, logprob_start_len=0
        )
        # The first entry of each prompt is (None, id, None): nothing comes before it.
        return [
            np.array([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]], np.float32)
            for answer in answers
        ]

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling, version: int) -> list[Completion]:
        # One request a sample, so that each has a seed of its own.
        common = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": list(sampling.stop_ids),
            # Added by the sampler, behind the model's graph: a hook on the logits is not called where graphs replay.
            "logit_bias": {str(i): float("-inf") for i in sampling.banned_ids} or None,
        }
        answers = self._request(
            [prompt for prompt in prompts for _ in range(sampling.n)],
            [common | {"sampling_seed": seed} for seed in sampling.seeds_for(len(prompts))],
            return_logprob=True,
        )
        ends = self._eos_ids | {*sampling.stop_ids}
        return [_completion(answer, version, ends) for answer in answers]

    def begin_weights(self) -> None:
        # SGLang 0.5.17 has no sessions around weight updates, 0.5.23 refuses updates without one.
        if self._updating:
            self.end_weights()
        if begin := getattr(self._engine, "begin_weight_update", None):
            _raise_failure("begin_weight_update", begin())
        self._updating = True

    def load_weights(self, bucket: BucketSpec, entries: Sequence[Entry]) -> None:
        names = ", ".join(entry.name for entry in entries[:3])
        _raise_failure(
            f"update_weights_from_tensor ({names}, … {len(entries)} tensors)",
            self._engine.update_weights_from_tensor(described(bucket, entries), load_format=LOADER, flush_cache=False),
        )

    def end_weights(self) -> None:
        if end := getattr(self._engine, "end_weight_update", None):
            _raise_failure("end_weight_update", end())
        self._updating = False
        self._settle()  # no cached state of the old weights survives

    def sleep(self, tags: Sequence[str] | None) -> None:
        self._settle()
        self._engine.release_memory_occupation(None if tags is None else list(tags))

    def wake(self, tags: Sequence[str] | None) -> None:
        self._engine.resume_memory_occupation(None if tags is None else list(tags))

    def close(self) -> None:
        self._engine.shutdown()

    def _settle(self) -> None:
        """empty the caches, which works only once the scheduler, a moment after its last answer, is idle"""
        end = time.monotonic() + IDLE_SECONDS
        while not self._engine.flush_cache().success:
            if time.monotonic() > end:
                raise EngineError(f"SGLang's scheduler did not become idle within {IDLE_SECONDS:g} s")
            time.sleep(0.01)

    def _request(self, prompts: Sequence[np.ndarray], sampling_params: Any, **more: Any) -> list[dict[str, Any]]:
        answers = self._engine.generate(
            input_ids=[prompt.tolist() for prompt in prompts], sampling_params=sampling_params, **more
        )
        _raise_given_up(enumerate(answers))
        return answers


def replicas(spec: EngineSpec) -> tuple[int, ...]:
    """for each part of the pool which of SGLang's data-parallel replicas writes it; empty where SGLang may choose

    It is the one whose GPUs hold the part, found by UUID, so that rows cross between GPUs no more than they must. Parts
    on GPUs without a replica, and those in host memory, are shared out evenly. SGLang chooses where there is only one
    replica, where they share GPUs, and where one would have nothing to do.
    """
    options, pool = spec.options, spec.pool
    count = options.get("dp_size", 1)
    if pool is None or count == 1 or options.get("enable_dp_attention"):
        return ()
    names, first, size = gpus() if pool.blocks else [], options.get("base_gpu_id", 0), _gpus_a_replica(spec)
    of = {name: (number - first) // size for number, name in enumerate(names) if 0 <= number - first < count * size}
    found: dict[int, int] = {}
    for part in range(pool.parts):
        if homes := Counter(of[block.gpu] for block in pool.blocks if block.part == part and block.gpu in of):
            found[part] = homes.most_common(1)[0][0]
    for part in (part for part in range(pool.parts) if part not in found):
        parts = Counter(found.values())
        found[part] = min(range(count), key=lambda replica, parts=parts: parts[replica])
    return tuple(found[part] for part in range(pool.parts)) if len(set(found.values())) == count else ()


def no_detokenizer(*_: object) -> None:
    """stands in for SGLang's detokenizer process: text is never asked for, and idling it holds 600 MB"""


def _memory(spec: EngineSpec) -> dict[str, float]:
    """SGLang's argument for `spec.mem_fraction`: it counts weights and cache as a share of what is free as it starts

    Nothing where there is none, or where the options say it in SGLang's own way.
    """
    if spec.mem_fraction is None or "mem_fraction_static" in spec.options:
        return {}
    first = spec.options.get("base_gpu_id", 0)
    count = _gpus_a_replica(spec) * (1 if spec.options.get("enable_dp_attention") else spec.options.get("dp_size", 1))
    if first >= len(gpus()):
        raise EngineError(f"GPU {first} is to run the engine, and this process sees {len(gpus())}")
    free, total, ordinal = min((*memory(i), i) for i in range(first, min(first + count, len(gpus()))))
    wanted = spec.mem_fraction * total
    if wanted >= free:
        raise EngineError(
            f"mem_fraction {spec.mem_fraction:g} is {wanted / 2**30:.1f} GiB of GPU {ordinal}, which has "
            f"{free / 2**30:.1f} GiB free: lower it, or JAX's share (XLA_PYTHON_CLIENT_MEM_FRACTION)"
        )
    return {"mem_fraction_static": wanted / free}


def _gpus_a_replica(spec: EngineSpec) -> int:
    return spec.options.get("tp_size", 1) * spec.options.get("pp_size", 1)


def _hooks(pool: PoolSpec | None) -> list[dict[str, Any]]:
    if pool is None:
        return []
    factory, config = "bridge.sglang_hook:write_rows", {"pool": asdict(pool)}
    return [{"name": "rows", "target_modules": ["model"], "hook_factory": factory, "config": config}]


def _completion(answer: dict[str, Any], version: int, ends: Collection[int]) -> Completion:
    meta, ids = answer["meta_info"], answer["output_ids"]
    return Completion(
        ids=np.array(ids, np.int32),
        logprobs=np.array([entry[0] for entry in meta["output_token_logprobs"]], np.float32),
        # 0.5.17 says "length" of an end that is the last token allowed, 0.5.23 does not.
        finish_reason="stop" if ids[-1] in ends else meta["finish_reason"]["type"],
        version=version,
    )


def _raise_given_up(answers: Iterable[tuple[int, dict[str, Any]]]) -> None:
    """SGLang says in an answer that it has none; each comes with the number of its prompt"""
    for index, answer in answers:
        reason = answer["meta_info"]["finish_reason"]
        if reason is not None and reason["type"] not in ("stop", "length"):
            raise EngineError(f"SGLang gave up prompt {index}: {reason.get('message', reason)}")


def _raise_failure(what: str, result: Any) -> None:
    """SGLang returns (False, message) where it failed; 0.5.17 and 0.5.23 add further values behind"""
    if not result[0]:
        raise EngineError(f"SGLang's {what} failed: {result[1]}")
