"""What can be asked of an engine that runs a model: the protocol and its records. Ids in, ids and rows out, never text.

Two sides speak it. `Engine` is what a trainer holds (`bridge.client.RemoteEngine`); `HostedEngine` is what the server
process drives (`SGLangEngine`, `TransformersEngine`). They differ only where weights come in: the trainer hands over
arrays, the hosted engine is told bucket by bucket where they lie, their names and shapes already checked.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float32, Int32

from bridge.errors import PromptError
from bridge.hidden_pool import PoolSpec
from bridge.weight_sync import BucketSpec, Entry

EngineKind = Literal["sglang", "transformers"]


@dataclass(frozen=True, eq=False)
class Prefill:
    """One prompt whose hidden rows are wanted.

    ids: the prompt's T token ids. spans: half-open ranges `(start, stop)` of positions that carry loss, ascending and
    disjoint. row: the pool row that receives the first of them; the others follow without a gap, in order.
    """

    ids: Int32[np.ndarray, " T"]
    spans: tuple[tuple[int, int], ...]
    row: int

    def __post_init__(self) -> None:
        check_ids(self.ids)
        edge = 0
        for start, stop in self.spans:
            if not edge <= start < stop <= len(self.ids):
                raise ValueError(
                    f"span ({start}, {stop}) of a prompt of {len(self.ids)} tokens is empty, outside the prompt, or "
                    f"not after the span before it; spans are ascending, disjoint, half-open ranges"
                )
            edge = stop
        if not self.spans or self.row < 0:
            raise ValueError("a prefill needs at least one span and a pool row of 0 or more")

    @property
    def count(self) -> int:
        """how many rows it writes"""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    temperature 0 is greedy; top_k 0 means all ids. A completion ends with the first of `stop_ids` or of the model's own
    end-of-sequence ids (config.json, generation_config.json), or after `max_new_tokens`. `banned_ids` are never
    sampled: the ids that the head holds and the tokenizer does not. n samples are drawn a prompt. Each has a seed of
    its own: drawn from `seed`, or the one in `seeds`, which has an entry a completion. SGLang heeds them only with its
    argument `enable_deterministic_inference`; otherwise its `random_seed` and the order of requests decide.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()
    seed: int = 0
    n: int = 1
    seeds: tuple[int, ...] | None = None

    def seeds_for(self, prompts: int) -> list[int]:
        """one below 2**32 for each of `n` completions of so many prompts; raises ValueError for too many or too few"""
        if self.seeds is None:
            return np.random.SeedSequence(self.seed).generate_state(prompts * self.n, np.uint32).tolist()
        if len(self.seeds) != prompts * self.n:
            raise ValueError(f"{len(self.seeds)} seeds for {prompts} prompts of {self.n} completions: one for each")
        return list(self.seeds)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.n < 1:
            raise ValueError(f"max_new_tokens ({self.max_new_tokens}) and n ({self.n}) must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}: "
                f"temperature and top_k are 0 or more, top_p lies in (0, 1]"
            )


@dataclass(frozen=True, eq=False)
class Completion:
    """One sampled continuation of R tokens.

    ids: the sampled ids, the stop id that ended it included. logprobs: of each of them under softmax(logits /
    temperature) (greedy: softmax(logits)), without the banned ids, before top-p and top-k. version: of the weights that
    wrote it.
    """

    ids: Int32[np.ndarray, " R"]
    logprobs: Float32[np.ndarray, " R"]
    finish_reason: Literal["stop", "length"]
    version: int


@dataclass(frozen=True)
class Health:
    """How an engine is. busy: the call it is in and for how many seconds, or None. counts: calls and tokens served."""

    kind: EngineKind
    model: str
    pid: int
    version: int
    seconds: float
    busy: tuple[str, float] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSpec:
    """Everything a server needs to host an engine.

    model: a local HF folder. dtype: what the model computes in ("float32", "bfloat16"). device: "cpu" or "cuda".
    threads: CPU threads, None for the engine's own choice. seed: SGLang's generator starts from it. mem_fraction: share
    of each GPU's whole memory that SGLang takes for weights and cache; None for its own choice. options: passed to the
    engine as they are, over our defaults.
    """

    kind: EngineKind
    model: str
    dtype: str
    device: str
    pool: PoolSpec | None = None
    threads: int | None = None
    seed: int = 0
    mem_fraction: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """What a trainer may ask. Faults raise `EngineError`, misuse ValueError, and of prompts `PromptError`."""

    def prefill(self, prompts: Sequence[Prefill]) -> None:
        """write the hidden rows (after the final norm) that carry loss into the pool; returns when all are there"""
        ...

    def score(self, prompts: Sequence[Int32[np.ndarray, " T"]]) -> list[Float32[np.ndarray, " T-1"]]:
        """log p(ids[t+1] | ids[:t+1]) of each prompt, from the engine's own full softmax at temperature 1"""
        ...

    def generate(self, prompts: Sequence[Int32[np.ndarray, " T"]], sampling: Sampling) -> list[Completion]:
        """`sampling.n` completions a prompt, those of one prompt side by side, in the order of the prompts"""
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Any]], *, version: int) -> None:
        """replace every weight by the named arrays, names and shapes as in the model's HF checkpoint"""
        ...

    def sleep(self, tags: Sequence[str] | None = None) -> None:
        """give device memory back ("weights", "kv_cache"; None is all); no other call until `wake`"""
        ...

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """take device memory again"""
        ...

    def health(self) -> Health:
        """answers even while another call runs"""
        ...

    def close(self) -> None:
        """stop the engine and free what it holds; calling it again does nothing"""
        ...


class HostedEngine(Protocol):
    """What the server asks of the engine it hosts. A bucket's content is valid during the call only."""

    max_tokens: int
    """a prompt may have, with what is generated behind it"""

    def prefill(self, prompts: Sequence[Prefill]) -> None: ...
    def score(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]: ...
    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling, version: int) -> list[Completion]: ...
    def begin_weights(self) -> None: ...
    def load_weights(self, bucket: BucketSpec, entries: Sequence[Entry]) -> None: ...
    def end_weights(self) -> None: ...
    def sleep(self, tags: Sequence[str] | None) -> None: ...
    def wake(self, tags: Sequence[str] | None) -> None: ...
    def close(self) -> None: ...


def check_ids(ids: np.ndarray, vocab: int | None = None, longest: int | None = None) -> None:
    """raise PromptError unless ids are int32 [T] with T >= 1, all in [0, vocab) and T at most `longest`"""
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.ndim != 1 or ids.size == 0:
        what = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise PromptError(f"a prompt is an int32 NumPy array of shape [T], T >= 1; got {what}")
    if longest is not None and ids.size > longest:
        raise PromptError(f"a prompt of {ids.size} tokens exceeds the engine's limit of {longest}")
    if vocab is not None and not (0 <= ids.min() and ids.max() < vocab):
        raise PromptError(f"ids run from {ids.min()} to {ids.max()}, the model knows 0 to {vocab - 1}")
