"""The student in engines of its own: they follow its weights and write its responses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from bridge.checkpoint import read_facts
from bridge.client import RemoteEngine
from bridge.engine import Completion, Sampling
from bridge.errors import EngineError
from kdjax.config import Config
from kdjax.engines import Answer, Revived, engine_device, engine_options, sleeping, started, wait_ready
from kdjax.rollouts.turns import Turns
from kdjax.rollouts.weights import send, student_label
from kdjax.training.student import export_student


class StudentEngines:
    """``rollout.engines`` engines that run the student as of some step.

    The version of weights is the number of steps that made them; every completion carries it. An engine that dies or
    misses a deadline is started again (``rollout.restarts``) and given the current weights, and its prompts are asked
    again with their seeds.
    ``turns`` is asked before they do anything: another is put there where devices are shared.

    Args:
        step: what trains the student, and so holds its newest weights.
        folder: gets the student as a Hugging Face folder, from which engines start, and their logs.
        tell: takes one line for each new start of an engine.
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
        tell: Callable[[str], None],
        banned_ids: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
        shared: RemoteEngine | None = None,
    ) -> None:
        rollout, self._banned = config.rollout, tuple(banned_ids)
        self._config, self._step, self._shared, self._longest = rollout, step, shared, config.data.max_len
        self.dtype = config.student.dtype if rollout.dtype == "auto" else rollout.dtype
        if shared is not None:
            self.dtype = shared.spec.dtype
        model = export_student(step.model, config, folder / "student", self.dtype)
        device = engine_device()
        self.stop_ids = read_facts(model).eos_ids | {*rollout.stop_ids, *stop_ids}
        self.version = -1
        self.turns = Turns()
        self._turn, self._changed, self._closed = threading.RLock(), threading.Condition(), False
        self.engines: list[RemoteEngine] = [] if shared is None else [shared]
        self._revived: list[Revived] = []
        sleeps, gpus = sleeping(config, device), rollout.tp if device == "cuda" else 0  # each has as many of its own
        try:
            for number in range(rollout.engines):
                self.engines.append(
                    started(
                        model,
                        "student",
                        kind=rollout.engine,
                        log=folder / f"student{number}.log",
                        dtype=self.dtype,
                        device=device,
                        seed=config.train.seed + number,
                        mem_fraction=rollout.mem_fraction,
                        threads=rollout.threads,
                        options=engine_options(rollout, sleeps, first_gpu=number * gpus),
                        start_timeout=rollout.start_timeout,
                        call_timeout=rollout.timeout,
                    )
                )
        except BaseException:  # an interrupt too: nobody else knows of the engines begun
            self.close()
            raise
        restarts = rollout.restarts, tell, lambda engine: self.turns.restarted(engine)
        words = {"whose": "student", "key": "rollout.restarts"}
        self._revived = [Revived(engine, *restarts, **words) for engine in self.engines]

    def wait_ready(self) -> None:
        """Until all answer. Raises EngineError when one does not in time, UserError when it takes too little."""
        for engine in self.engines:
            wait_ready(engine, self._longest, "student", "rollout.args")

    def score(self, documents: Sequence[Int32[np.ndarray, " T"]]) -> list[list[np.ndarray]]:
        """Each engine's log-probabilities of each document's tokens, to compare with the trainer's."""
        self.turns.enter("generate")
        return [self._ask(revived, lambda engine: engine.score(documents)) for revived in self._revived]

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
        version = min([revived.ask(self._send) for revived in self._revived])
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
                threads.submit(self._generate, revived, [prompts[i] for i in share], [seeds[i] for i in share])
                for revived, share in zip(self._revived, shares, strict=False)
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
        for revived in self._revived:
            revived.end()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _generate(self, revived: Revived, prompts: list[Int32[np.ndarray, " T"]], seeds: list[int]) -> list[Completion]:
        rollout = self._config
        sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_ids=tuple(sorted(self.stop_ids)),
            banned_ids=self._banned,
            seeds=tuple(seeds),
        )

        return self._ask(revived, lambda engine: engine.generate(prompts, sampling))

    def _ask(self, revived: Revived, question: Callable[[RemoteEngine], Answer]) -> Answer:
        """The answer of an engine that runs the student: one that was started again gets its weights first."""

        def asked(engine: RemoteEngine) -> Answer:
            while True:
                with self._turn:  # while weights are under way it holds none either
                    if engine.holds is None:  # it was started again
                        self.turns.enter("resend")
                        self._send(engine)
                        self.turns.enter("generate")
                    pid = engine.pid
                answer = question(engine)
                # Else the thread that sends weights has found it dead meanwhile and started it, with none sent yet.
                if engine.pid == pid:
                    return answer

        return revived.ask(asked)

    def _send(self, engine: RemoteEngine) -> int:
        """Give an engine the newest weights; returns their version."""
        with self._turn, self._step.lock:
            version, bucket = self._step.number, self._config.bucket_bytes
            label = student_label(version)
            send(engine, self._step.model, version=version, whose="student", label=label, bucket_bytes=bucket)
        return version
