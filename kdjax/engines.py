"""Engines as a run has them: where they run, what they are told, and that one which dies is started again.

None of it starts JAX.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import jax

from bridge.client import RemoteEngine, default_device, start_engine
from bridge.errors import EngineError, PromptError
from kdjax.config import Config, RolloutConfig, TeacherConfig
from kdjax.errors import UserError, first_line

Answer = TypeVar("Answer")

JAX_SHARE = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")  # the name that JAX 0.10 knows, and the later
JAX_ON_GPUS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
OTHERS_SHARE, LEAST_SHARE = 0.1, 0.1  # for the pool, engines' activations and CUDA; for a student at least


def engine_device() -> str:
    """``cuda`` where an NVIDIA driver answers and JAX goes there too, by its packages and ``JAX_PLATFORMS``; else
    ``cpu``."""
    platforms = jax.config.jax_platforms
    kept_off = platforms and not {"cuda", "gpu"} & set(platforms.split(","))
    return "cpu" if kept_off or not any(map(find_spec, JAX_ON_GPUS)) else default_device()


def leave_room(config: Config) -> None:
    """Tell JAX which share of each GPU's memory to take: what engines leave, unless the environment names one.

    To be called before JAX starts; later, and on a CPU, it changes nothing.
    """
    teacher, rollout = config.teacher, config.rollout
    if teacher.path is None or any(os.environ.get(name) for name in JAX_SHARE):
        return
    own = config.distill.on_policy_fraction and rollout.engines  # with none the student has the teacher's
    shares = [teacher.mem_fraction, *([rollout.mem_fraction] if own else [])]
    engines = max(shares) if config.colocate else sum(shares)
    os.environ[JAX_SHARE[0]] = f"{max(LEAST_SHARE, 1 - OTHERS_SHARE - engines):.2f}"


def engine_dtype(dtype: str, device: str) -> str:
    """What an engine computes in: ``auto`` is bfloat16 on a GPU and float32 on a CPU, where bfloat16 may be slow."""
    return {"cpu": "float32", "cuda": "bfloat16"}[device] if dtype == "auto" else dtype


def computes_bfloat16(about: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has instructions for bfloat16 (AMX, AVX512-BF16, Arm's); without them it is slow."""
    words = set(about.read_text().split()) if about.exists() else set()
    return not words.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})


def sleeping(config: Config, device: str) -> dict[str, Any]:
    """SGLang's arguments for engines that sleep: what they give up of the GPU's memory waits on the host."""
    if not config.colocate or device == "cpu":
        return {}
    return {"enable_memory_saver": True, "enable_weights_cpu_backup": True}


def engine_options(
    group: TeacherConfig | RolloutConfig, more: Mapping[str, Any] = MappingProxyType({}), *, first_gpu: int = 0
) -> dict[str, Any]:
    """SGLang's arguments that have keys of their own, ``more``, then the user's; plain transformers has only these.

    ``first_gpu`` is added to the number of the GPU that the engine starts at.
    """
    if group.engine != "sglang":
        return dict(group.args)
    named: dict[str, Any] = {"tp_size": group.tp}
    if isinstance(group, TeacherConfig):
        named |= dict(
            pp_size=group.pp,
            dp_size=group.dp,
            ep_size=group.ep,
            quantization=group.quantization,
            trust_remote_code=group.trust_remote_code,
        )
    options = named | dict(more) | dict(group.args)
    return options | ({"base_gpu_id": options.get("base_gpu_id", 0) + first_gpu} if first_gpu else {})


def started(model: Path, key: str, **how: Any) -> RemoteEngine:
    """``bridge.client.start_engine``, which answers later. Raises UserError for a folder that is no model's."""
    try:
        return start_engine(model, wait=False, **how)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def wait_ready(engine: RemoteEngine, longest: int, whose: str, key: str) -> None:
    """Until ``engine`` answers. Raises UserError where it does not take documents of ``longest`` tokens."""
    engine.wait_ready()
    if longest > engine.max_tokens:
        raise UserError(
            f"data.max_len={longest} is beyond the {engine.max_tokens} tokens that the {whose}'s engine takes (of the "
            f"model's positions SGLang keeps a few for itself); lower it, or raise what limits the engine in {key}"
        )


class Revived:
    """Asks an engine and, where it dies or misses a deadline, starts it anew and asks again.

    Only an engine that is gone is started again: one that lives and answers with a fault would answer so again.

    Args:
        engine: as started from its model folder; a restart has the weights of that folder.
        restarts: how often one question may be repeated.
        tell: takes one line for each restart.
        restarted: called after each, before the question is asked again.
        whose: what the engine runs, in messages.
        key: of the configuration, that says how often.
        limit: the key that says how long a prompt may be.
    """

    def __init__(
        self,
        engine: RemoteEngine,
        restarts: int,
        tell: Callable[[str], None],
        restarted: Callable[[RemoteEngine], None] = lambda engine: None,
        *,
        whose: str = "teacher",
        key: str = "teacher.restarts",
        limit: str = "data.max_len",
    ) -> None:
        self.engine, self.count = engine, 0
        self._restarts, self._tell, self._restarted = restarts, tell, restarted
        self._whose, self._key, self._limit = whose, key, limit
        self._turn, self._ended = threading.Lock(), False

    def ask(self, question: Callable[[RemoteEngine], Answer]) -> Answer:
        """The answer to ``question(engine)``. Several threads may ask.

        Raises EngineError where the engine fails for good, with the place of its log, and UserError for what it was
        asked and cannot do, such as a prompt beyond its limit.
        """
        tried = 0
        while True:
            asked = None
            try:
                if tried:
                    self._revive()
                asked = self.engine.pid
                return question(self.engine)
            except PromptError as error:
                raise UserError(f"{self._whose} {self.engine.spec.model}: {error}; see {self._limit}") from None
            except EngineError as error:
                lives = asked is not None and self.engine.pid == asked
                if lives or self._ended:
                    raise
                if tried == self._restarts:
                    raise EngineError(f"{error}\n(started again {tried} times; {self._key})") from None
                tried, self.count = tried + 1, self.count + 1
                self._tell(
                    f"{first_line(error)}; starting it again, {tried} of {self._restarts} (log: {self.engine.log})"
                )

    def end(self) -> None:
        """From now on a dead engine stays dead."""
        self._ended = True

    def _revive(self) -> None:
        with self._turn:
            if self._ended:  # while this thread waited for its turn
                raise EngineError(f"{self._whose} {self.engine.spec.model} is closed")
            if self.engine.pid is None:  # else another thread was quicker
                self.engine.restart()
                self._restarted(self.engine)
