"""Where batches come from: a stream of them on the mesh, each with the hidden rows its teacher wrote.

A background thread keeps the teacher ahead of the student: while step t trains, the engine's prefill of batch t + 1
writes straight into leased rows of the pool, and only the rows' addresses come back.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Bool

from bridge.hidden_pool import Lease
from kdjax.algorithms.base import Teacher
from kdjax.config import Config
from kdjax.data import (
    Batch,
    BatchSource,
    DataStream,
    Document,
    HostBatch,
    compare_vocabularies,
    eval_batches,
    load_tokenizer,
    valid_ids,
)
from kdjax.data.budget import TokenBudget
from kdjax.data.files import refuse_missing
from kdjax.data.prepare import first_documents, open_sources
from kdjax.engines import engine_device, leave_room
from kdjax.errors import UserError
from kdjax.head import Head
from kdjax.rollouts.engines import StudentEngines
from kdjax.rollouts.overlap import Waits
from kdjax.rollouts.self_teacher import SelfTeacher
from kdjax.rollouts.stream import RolloutStream
from kdjax.rollouts.turns import WEIGHTS, Turns
from kdjax.sharding import BATCH_AXES, data_shards, make_mesh
from kdjax.training.ahead import Ahead
from kdjax.training.device_batch import DeviceBatch
from kdjax.training.step import Parked, Step
from kdjax.training.student import student_shape, tokenizer_path
from kdjax.training.teacher import TeacherEngine

LOG_RATIO = "rollout/kl"


class Stream:
    """Iterates ``DeviceBatch``es for as long as the configuration's data lasts; see ``stream``."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh | None = None,
        *,
        log: Path | None = None,
        tell: Callable[[str], None] = logging.getLogger("kdjax").warning,
    ) -> None:
        self.config, self._tell = config, tell
        leave_room(config)
        self.mesh = mesh if mesh is not None else make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        self.shards = data_shards(self.mesh)
        rows = _rows(config, self.shards)
        self._exit = ExitStack()
        self.data: BatchSource
        self.engine: TeacherEngine | None = None
        self._worker: Ahead[tuple[HostBatch, Lease | None, dict[str, float]]] | None = None
        self._sender: Ahead[bool] | None = None
        self._begun = False  # whether batches are being made
        self._ready: deque[tuple[HostBatch, tuple[Lease | None, dict[str, float]]]] = deque()  # of a call for several
        self._end: Exception | None = None  # of the data
        self._taken: DeviceBatch | None = None
        self.steps: int | None = None
        """After so many batches of a run there are no more."""
        self._given = 0  # batches, those of an earlier life of the run included
        self._step: Step | None = None
        self._rollouts: RolloutStream | None = None
        self.turns, self._waits = Turns(), Waits()
        self.self_teacher: SelfTeacher | None = None
        self.teachers: tuple[Teacher, ...] = ()
        self._student_ids = student_shape(config).vocab_size
        self._shape = dict(batch=rows, shards=self.shards, vocab_size=self._student_ids)
        try:
            self._open(log or Path(config.output) / "engine.log")
        except BaseException:  # an interrupt too: nobody else could close what is open by now
            self.close()
            raise

    def _open(self, log: Path) -> None:
        config = self.config
        for source in (*config.data.train, *config.data.eval):
            refuse_missing(source.path)
        if config.teacher.path is not None:
            slots = self._lookahead + 1 + self._batches_per_call
            self.engine = TeacherEngine(config, self.mesh, slots=slots, log=log, tell=self._tell)
            self._exit.callback(self.engine.close)
            self.engine.before = self._before_prefill
            self.engine.restarted = lambda engine: self.turns.restarted(engine)
            self._shape["vocab_size"] = min(self._shape["vocab_size"], self.engine.vocab_size)
        # The engine starts in its own process while the tokenizer and the data are opened here.
        self.tokenizer = load_tokenizer(tokenizer_path(config))
        if self.engine is not None:
            head = replace(self.engine.head, valid=self._shared_ids(self.engine.head))
            self.teachers = (Teacher(head, head.width, config.teacher.path),)
        shape = self._shape | {"accumulate": config.train.accumulate}
        if config.train.tokens_per_batch is not None:
            shape |= {"batch": None, "tokens_per_batch": config.train.tokens_per_batch}
        if config.distill.on_policy_fraction:
            self.data = self._rollouts = RolloutStream(config, self.tokenizer, **shape)
            self._waits = self._rollouts.waits
        else:
            self.data = DataStream(config.data, self.tokenizer, seed=config.train.seed, **shape)
        self._exit.callback(self.data.close)

    @property
    def _lookahead(self) -> int:
        """How many batches may be ready before they are asked for."""
        config = self.config
        if config.colocate:
            return 0
        if config.distill.on_policy_fraction:
            return max(1, config.rollout.max_staleness)
        return config.teacher.lookahead if config.teacher.path else 1

    @property
    def _batches_per_call(self) -> int:
        config = self.config
        follows = config.distill.on_policy_fraction or config.teacher.update_every
        return 1 if follows else config.teacher.batches_per_call

    def _shared_ids(self, head: Head) -> Bool[Array, " V"]:
        """The ids that mean something to both models. Raises UserError when their vocabularies differ."""
        theirs = load_tokenizer(self.config.teacher.path)
        match = compare_vocabularies(self.tokenizer, theirs, self.config.data.special_token_map)
        for line in match.lines():
            self._tell(line)
        return jax.numpy.asarray(valid_ids(theirs, head.vocabulary) & valid_ids(self.tokenizer, head.vocabulary))

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        return self.take(lambda: False)

    def take(self, give_up: Callable[[], Any]) -> DeviceBatch | None:
        """The next batch, or None as soon as ``give_up()`` is true while an engine is waited for."""
        if not self._begun:
            if self._step is None and (self._rollouts is not None or self.config.teacher.update_every):
                raise UserError("engines are to follow a student in training: call stream.attach(step) first")
            self._produced = self._given = 0 if self._step is None else self._step.number
            self._begun = True
        self._refuse_haste()
        self._look_back()
        with self._waits.waiting():
            self._work()
            synced = self._follow(give_up)
            start = time.perf_counter()
            made = None if synced is None else self._worker.take(give_up)
            if made is None:
                self._give_up()
                return None
            self.turns.enter("train")
        host, lease, seconds = made
        seconds = synced | seconds | {"waiting": time.perf_counter() - start}
        start = time.perf_counter()
        arrays = self.place(host, lease)
        batch = DeviceBatch(arrays, host, seconds | {"transfer": time.perf_counter() - start})
        if lease is not None:
            batch.release_after = lambda array: self.engine.release_after(array, lease)
        self._taken, self._given = batch, self._given + 1
        return batch

    def attach(self, step: Step) -> None:
        """Let engines that follow the student take its weights from ``step``: those that write its responses, and a
        teacher that is its earlier self. Where there are such, this is needed before the first batch."""
        config, self._step = self.config, step
        if config.colocate:
            self.turns = Turns({"student": config.rollout.resident, "teacher": config.teacher.resident})
            if "parameters" in config.train.offload:
                self.turns.join("trainer", [Parked(step)], awake=[WEIGHTS])
            self.wait_ready()
            self.turns.join("teacher", [self.engine.remote])
        if self._rollouts is not None:
            if engine_device() == "cuda":  # SGLang sizes its cache by what is free as it starts: one after the other
                self.wait_ready()
            known = valid_ids(self.tokenizer, self._student_ids)
            known[self._shape["vocab_size"] :] = False  # the teacher could not read them
            end = self.tokenizer.eos_token_id
            self._rollouts.engines = StudentEngines(
                config,
                step,
                Path(config.output),
                tell=self._tell,
                banned_ids=np.flatnonzero(~known).tolist(),
                stop_ids=[] if end is None else [end],
                shared=None if config.rollout.engines else self.engine.remote,
            )
        if config.teacher.update_every is not None:
            self.self_teacher = SelfTeacher(
                step,
                self.engine.remote,
                self.teachers[0].head,
                every=config.teacher.update_every,
                decay=config.teacher.ema_decay,
                bucket_bytes=config.rollout.bucket_bytes,
            )
            self._exit.callback(self.self_teacher.close)
        if config.colocate and self.students is not None:
            self.students.wait_ready()
            self.turns.join("student", self.students.engines)
        for follower in filter(None, (self.students, self.self_teacher)):
            follower.turns = self.turns

    @property
    def students(self) -> StudentEngines | None:
        """The engines that run the student."""
        return None if self._rollouts is None else self._rollouts.engines

    def _work(self) -> None:
        """Begin, if it is not begun, to make batches and to send weights behind the trainer's back."""
        if self._worker is not None:
            return
        self._worker = Ahead(self._produce, self._lookahead)
        self._exit.callback(self._worker.stop)
        if self.students is not None:
            self._sender = Ahead(self._send, 0)
            self._exit.callback(self._sender.stop)

    def _follow(self, give_up: Callable[[], Any]) -> dict[str, float] | None:
        """Bring the engines that follow the student up to date; returns the seconds it took."""
        if self.config.colocate:
            self.turns.enter("train")
        start = time.perf_counter()
        if self.self_teacher is not None:
            self.self_teacher.follow()
        if self._sender is not None and self._sender.take(give_up) is None:
            return None
        follows = self.self_teacher is not None or self.students is not None
        return {"sync": time.perf_counter() - start} if follows else {}

    def _refuse_haste(self) -> None:
        """Refuse a batch that is to be made with weights of a step that was never called: it would not come."""
        if self._step is None:
            return
        needed, number = 0, self._given + 1
        if self.students is not None:
            needed = self._given - self.config.rollout.max_staleness
        if self.self_teacher is not None:
            needed = max(needed, self.self_teacher.needed(number))
        if needed > self._step.number:
            raise UserError(
                f"batch {number} needs the weights of step {needed}, and step {self._step.number} is the last that "
                f"was made: call the step with each batch before taking the next"
            )

    def _look_back(self) -> None:
        """See what the last step found of its responses, and where teacher and student take turns wait for its end."""
        # The step was dispatched, and may still run when the next batch is asked for; one that the teacher has been
        # through already wakes nobody.
        if self._lookahead == 0 and not self._ready:
            self.engine.wait_released()
        if self._taken is not None:
            log_ratio = self._taken.by_row.get(LOG_RATIO)
            self.data.learned(self._taken.host, None if log_ratio is None else np.asarray(log_ratio))
        self._taken = None

    def state(self) -> dict[str, Any]:
        """The data position before anything was taken; afterwards each ``batch.host`` carries its own."""
        return self.data.state()

    def restore(self, position: dict[str, Any]) -> None:
        """Continue after the batch whose ``host.state`` is ``position``. Call it before taking a batch."""
        self.data.restore(position)

    def wait_ready(self) -> None:
        """Until the teacher answers. Raises as ``TeacherEngine.wait_ready``."""
        if self.engine is not None:
            self.engine.wait_ready()

    def held_out(self) -> list[HostBatch]:
        """Every held-out row once, read and laid out; needs no teacher."""
        if not self.config.data.eval:
            return []
        return eval_batches(self.config.data, self.tokenizer, max_rows=self.config.train.eval_rows, **self._shape)

    def evaluation(self, hosts: Sequence[HostBatch] | None = None) -> list[DeviceBatch]:
        """``held_out()`` on the mesh, with teacher rows computed here, once, and kept outside the pool."""
        batches = []
        for host in self.held_out() if hosts is None else hosts:
            ((lease, _),) = self._consult(host)
            arrays = self.place(host, lease, copy=True)
            if lease is not None:
                jax.block_until_ready(arrays.teacher_hidden)
                lease.release()
            batches.append(DeviceBatch(arrays, host))
        self.turns.enter("train")
        return batches

    def documents(self, count: int, *, held_out: bool = False) -> list[Document]:
        """At most ``count`` usable documents, equally many from the start of each training or held-out source.

        Rows are tokenized until they are found; fewer come from a source that has no more.
        """
        if not held_out:
            return self.data.sample(count)
        data = replace(self.config.data, train_on="assistant")
        sizes = {"max_len": data.max_len, "vocab_size": self._shape["vocab_size"]}
        return first_documents(open_sources(data.eval, data, self.tokenizer, **sizes, seed=0), count)

    def gauges(self) -> dict[str, float]:
        """Numbers about the teacher's pool and engine; see TeacherEngine."""
        return {} if self.engine is None else self.engine.gauges()

    def place(self, host: HostBatch, lease: Lease | None = None, *, copy: bool = False) -> Batch:
        """Put a host batch on the mesh; the teacher's rows are viewed where the engine wrote them, or copied."""
        batch = to_device(host.batch, self.mesh)
        if lease is None:
            return batch
        return replace(batch, teacher_hidden=(self.engine.view(lease, host.batch.rows.shape, copy=copy),))

    def _produce(self) -> tuple[HostBatch, Lease | None, dict[str, float]]:
        if not self._ready:
            hosts = self._read()
            self._ready.extend(zip(hosts, self._consult(*hosts), strict=True))
        host, (lease, seconds) = self._ready.popleft()
        return host, lease, host.seconds | seconds

    def _read(self) -> list[HostBatch]:
        """The batches of the teacher's next call. What ends the data, or is wrong with it, waits behind them."""
        hosts: list[HostBatch] = []
        while self._end is None and len(hosts) < self._batches_per_call:
            try:
                if self._produced == self.steps:  # no response is to be written that no step learns from
                    raise StopIteration
                hosts.append(next(self.data))
            except Exception as end:
                self._end = end
                break
            self._produced += 1
            if self.self_teacher is not None:
                self.self_teacher.wait_for(self._produced)
        if not hosts:
            raise self._end
        return hosts

    def _send(self) -> bool:
        self.students.follow()
        return True

    def _consult(self, *hosts: HostBatch) -> list[tuple[Lease | None, dict[str, float]]]:
        if self.engine is None:
            return [(None, {}) for _ in hosts]
        leases, seconds = self.engine.consult(*hosts)
        return [(lease, {"teacher": seconds}) for lease in leases]

    def _before_prefill(self) -> None:
        """A teacher that follows the student gets its weights, after a new start too; held-out rows, asked for before
        the first batch, are those of the teacher as it was at the start of the run."""
        if self.self_teacher is not None and self._begun:
            self.self_teacher.send()
        self.turns.enter("prefill")

    def close_refusing(self, number: int) -> None:
        """Close; what was written for step ``number`` and later ones is not read back when the run goes on."""
        self.close()
        self._join()
        self.data.set_aside(number)

    def kill(self) -> None:
        """End the engines and unlink the pool at once, whatever they are doing; the process is about to end."""
        self._kill_engines()
        if self.engine is not None:
            self.engine.pool.close()

    def close(self) -> None:
        """Stop the engines and free the pool; safe to call twice."""
        try:
            if self._taken is not None and all(array.is_ready() for array in self._taken.by_row.values()):
                self._look_back()
        finally:
            self._exit.close()

    def _give_up(self) -> None:
        """No batch is wanted any more, and the step is about to be saved, which nobody may be moving then."""
        if "parameters" in self.config.train.offload:
            self._kill_engines()
            self._join()

    def _join(self) -> None:
        """Wait until no thread makes or sends anything; its engines must have ended."""
        for thread in filter(None, (self._sender, self._worker)):
            thread.join()

    def _kill_engines(self) -> None:
        if self.engine is not None:
            self.engine.kill()
        if self.students is not None:
            self.students.kill()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _rows(config: Config, shards: int) -> int:
    """Rows of ``data.max_len`` tokens in a micro-batch over all shards."""
    train, longest = config.train, config.data.max_len
    if train.tokens_per_batch is not None:
        return TokenBudget(train.tokens_per_batch, longest, train.accumulate, shards).rows(longest)
    rows = train.batch_size // train.accumulate
    if rows % shards:
        raise UserError(
            f"train.batch_size={train.batch_size} over accumulate={train.accumulate} leaves {rows} "
            f"row(s) for {shards} data shards (mesh.data × mesh.fsdp); make it a multiple"
        )
    return rows


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """Put a stack of host micro-batches ``[A, …]`` on the mesh, rows split over ("data", "fsdp")."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(None, BATCH_AXES))), batch)


def stream(config: Config, mesh: Mesh | None = None, *, log: Path | None = None) -> Stream:
    """Start the teacher that ``config`` names, if any, and iterate device batches; use it in a ``with``.

    Args:
        mesh: where batches live; by default built from ``config.mesh``.
        log: file that receives the engine's own output.

    Raises UserError for what configuration, data or model folders can mend, EngineError where the teacher fails.
    """
    return Stream(config, mesh, log=log)
