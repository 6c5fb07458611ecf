"""The student in engines of its own: they follow its weights and write its responses."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from bridge.checkpoint import read_facts
from bridge.client import RemoteEngine, start_engine
from bridge.engine import Completion, Sampling
from bridge.errors import EngineError
from kdjax.config import Config
from kdjax.errors import UserError, first_line
from kdjax.rollouts.turns import Turns
from kdjax.rollouts.weights import EngineTensors
from kdjax.training.student import export_student

RESTARTS = 2  # of one engine for one batch: what kills it again and again is no accident


class StudentEngines:
    """``rollout.engines`` engines that run the student as of some step.

    The version of weights is the number of steps that made them; every completion carries it. An engine that dies or
    misses a deadline is started again and given the current weights, and its prompts are asked again with their seeds.
    ``turns`` is asked before they do anything: another is put there where devices are shared.

    Args:
        step: what trains the student, and so holds its newest weights.
        folder: gets the student as a Hugging Face folder, from which engines start, and their logs.
        banned_ids: ids that the head holds and the tokenizer does not.
        stop_ids: ids that end a response, beside the model's own and the configured ones.
        shared: with no engine of its own, the teacher's; it takes the student's weights when it is to write.
    """

    def __init__(
        self,
        config: Config,
        step: Any,
        folder: Path,
        *,
        banned_ids: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
        shared: RemoteEngine | None = None,
    ) -> None:
        rollout = config.rollout
        self._config, self._step, self._shared = rollout, step, shared
        self.dtype = config.student.dtype if rollout.dtype == "auto" else rollout.dtype
        if shared is not None:
            self.dtype = shared.spec.dtype
        model = export_student(step.model, config, folder / "student", self.dtype)
        self.stop_ids = read_facts(model).eos_ids | {*rollout.stop_ids, *stop_ids}
        self.version = -1
        self.turns = Turns()
        self.notes: list[str] = []
        self._turn, self._changed, self._closed = threading.Lock(), threading.Condition(), False
        self.engines: list[RemoteEngine] = [] if shared is None else [shared]
        try:
            for number in range(rollout.engines):
                self.engines.append(
                    start_engine(
                        model,
                        kind=rollout.engine,
                        log=folder / f"student{number}.log",
                        dtype=self.dtype,
                        banned_ids=banned_ids,
                        threads=rollout.threads,
                        options=_engine_options(config, number),
                        start_timeout=rollout.start_timeout,
                        call_timeout=rollout.timeout,
                        wait=False,
                    )
                )
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        """Until all answer. Raises EngineError when one does not start in time."""
        for engine in self.engines:
            engine.wait_ready()

    def score(self, documents: Sequence[Int32[np.ndarray, " T"]]) -> list[np.ndarray]:
        """The first engine's log-probabilities of each document's tokens, to compare with the trainer's."""
        self.turns.enter("generate")
        return self.engines[0].score(documents)

    def follow(self) -> None:
        """Send the student's weights, if they are new and ``rollout.sync_every`` steps are done."""
        done = self._step.number
        if self.version < 0 or (done > self.version and done % self._config.sync_every == 0):
            self.sync()

    def sync(self) -> None:
        """Send the newest weights to every engine, tensor by tensor. Returns when all run with them.

        Raises EngineError that names the tensor where it broke off.
        """
        self.turns.enter("sync")
        self.notes += [
            f"the student's engine is started again: it was found dead (log: {engine.log})"
            for engine in self.engines
            if engine.pid is None
        ]
        with self._turn:
            version = min([self._send(engine) for engine in self.engines])
        with self._changed:
            self.version = version
            self._changed.notify_all()

    def wait_for(self, version: int) -> None:
        """Until the engines run with weights of at least this version. Raises EngineError once they are closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.version >= version)
        if self._closed:
            raise EngineError("the student's engines are closed")

    def generate(self, prompts: Sequence[Int32[np.ndarray, " T"]], seeds: Sequence[int]) -> list[Completion]:
        """One completion a prompt, each with its own seed; prompts are shared out to the engines in order."""
        if self._shared is not None and self._shared.holds != student_label(self.version):
            self.sync()
        self.turns.enter("generate")
        shares = [part for part in np.array_split(np.arange(len(prompts)), len(self.engines)) if part.size]
        with ThreadPoolExecutor(max(1, len(shares))) as threads:
            jobs = [
                threads.submit(self._generate, engine, [prompts[i] for i in share], [seeds[i] for i in share])
                for engine, share in zip(self.engines, shares, strict=False)
            ]
            return [completion for job in jobs for completion in job.result()]

    def kill(self) -> None:
        """End the engines at once, whatever they are doing, and for good."""
        self._end()
        for engine in self.engines:
            engine.kill()

    def close(self) -> None:
        self._end()
        for engine in self.engines:
            if engine is not self._shared:
                engine.close()

    def _end(self) -> None:
        """From now on nobody is waited for, and a dead engine stays dead."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _generate(
        self, engine: RemoteEngine, prompts: list[Int32[np.ndarray, " T"]], seeds: list[int]
    ) -> list[Completion]:
        rollout = self._config
        sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_ids=tuple(sorted(self.stop_ids)),
            seeds=tuple(seeds),
        )
        restarts = 0
        while True:
            try:
                return engine.generate(prompts, sampling)
            except ValueError as error:
                raise UserError(f"rollout: the student's engine refuses a prompt: {error}; see data.max_len") from None
            except EngineError as error:
                restarts += 1
                if not self._may_restart(engine, restarts):
                    raise
                self._note(error)
                with self._turn:
                    self.turns.enter("sync")
                    self._send(engine)
                    self.turns.enter("generate")

    def _send(self, engine: RemoteEngine) -> int:
        """Give one engine the newest weights, after a new start if it is dead; returns their version."""
        restarts = 0
        while True:
            tensors = EngineTensors(self._step.model, self.dtype, engine_device=engine.spec.device)
            try:
                if engine.pid is None:
                    engine.restart()
                    self.turns.restarted(engine)
                with self._step.lock:
                    version = self._step.number
                    engine.update_weights(
                        tensors,
                        version=version,
                        bucket_bytes=self._config.bucket_bytes,
                        label=student_label(version),
                        gpu=tensors.gpu,
                    )
                return version
            except EngineError as error:
                restarts += 1
                if not self._may_restart(engine, restarts):
                    raise EngineError(
                        f"the weights of step {self._step.number} did not reach the student's engine, it broke off at "
                        f"{tensors.last}: {error}\nrun the same command again to go on from the last checkpoint"
                    ) from None
                self._note(error)

    def _may_restart(self, engine: RemoteEngine, restarts: int) -> bool:
        """Whether the engine is dead, as opposed to alive and refusing, and has not died too often."""
        return engine.pid is None and restarts <= RESTARTS and not self._closed

    def _note(self, error: EngineError) -> None:
        self.notes.append(f"the student's engine is started again: {first_line(error)}")


def student_label(version: int) -> tuple[str, int]:
    """What an engine ``holds`` that runs the student as of step ``version``."""
    return "student", version


def _engine_options(config: Config, number: int) -> dict[str, Any]:
    """SGLang's arguments of the engine of this number: each has ``rollout.tp`` GPUs of its own, one after the other."""
    rollout = config.rollout
    if rollout.engine != "sglang":
        return dict(rollout.args)
    named = dict(tp_size=rollout.tp, mem_fraction_static=rollout.mem_fraction)
    options = named | sleeping(config) | dict(rollout.args)
    if jax.default_backend() != "cpu":
        options["base_gpu_id"] = options.get("base_gpu_id", 0) + number * rollout.tp
    return options


def sleeping(config: Config) -> dict[str, Any]:
    """SGLang's arguments for engines that sleep: what they give up of the GPU's memory waits on the host."""
    if not config.colocate or jax.default_backend() == "cpu":
        return {}
    return {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
