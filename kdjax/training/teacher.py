"""The teacher at work: its head in JAX, its engine in a process of its own, and the pool that its hidden rows pass."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float

from bridge.client import RemoteEngine
from bridge.engine import Prefill
from bridge.hidden_pool import HiddenPool, Lease
from kdjax.config import Config
from kdjax.data import HostBatch
from kdjax.engines import Revived, engine_device, engine_dtype, engine_options, sleeping, started, wait_ready
from kdjax.errors import UserError
from kdjax.folders import resolve
from kdjax.models import teacher_head, teacher_shape
from kdjax.sharding import BATCH_AXES, Rules, data_shards

LEAST_ROWS = 1024  # of a pool, so that the preflight's sample fits whatever the batch
ALIGNMENT_ROWS = 64  # enough to align the next lease
CLOSE_SECONDS = 5.0  # for an engine to end by itself


class TeacherEngine:
    """Launches the engine that ``config.teacher`` names, without waiting for it, over a pool of ``slots`` batches.

    A lease is always a whole slot, room for a batch in which every position carries loss: leases of one length leave no
    gaps that fit nothing. An engine that dies is started again (``teacher.restarts``).

    Attributes:
        head: the teacher's head on the mesh.
        remote: the running engine.
        before: called before each prefill, and again after a new start.
        restarted: called with the engine after a new start.
    """

    def __init__(self, config: Config, mesh: Mesh, *, slots: int, log: Path, tell: Callable[[str], None]) -> None:
        teacher, self.mesh, shards = config.teacher, mesh, data_shards(mesh)
        model, device = teacher_shape(teacher.path), engine_device()
        self.vocab_size, limit = model.vocab_size, model.max_position_embeddings
        if limit is not None and config.data.max_len > limit:
            raise UserError(f"data.max_len={config.data.max_len} is beyond the teacher's {limit} positions; lower it")
        folder, dtype = resolve(teacher.path), engine_dtype(teacher.dtype, device)
        self.head = teacher_head(folder, mesh=mesh, rules=Rules(), dtype=dtype)
        self.before: Callable[[], None] = lambda: None
        self.restarted: Callable[[RemoteEngine], None] = lambda engine: None
        self._timeout, self._slots, self._longest = teacher.timeout, slots, config.data.max_len
        train = config.train
        self._slot_rows = (train.tokens_per_batch or train.batch_size * config.data.max_len) // shards
        self._lent: deque[tuple[jax.Array, Lease]] = deque()
        with ExitStack() as opened:
            # On GPUs each data shard has rows of its own on every GPU that trains on it; a CPU's devices share memory.
            self.pool = HiddenPool.create(
                rows=max(slots * (self._slot_rows + ALIGNMENT_ROWS), LEAST_ROWS),
                width=model.hidden_size,
                dtype=dtype,
                parts=shards,
                on=_gpus_of_shards(mesh, shards),
            )
            opened.callback(self.pool.close)
            self.remote = started(
                folder,
                "teacher.path",
                kind=teacher.engine,
                pool=self.pool,
                log=log,
                device=device,
                seed=config.train.seed,
                mem_fraction=teacher.mem_fraction,
                threads=teacher.threads,
                start_timeout=teacher.start_timeout,
                call_timeout=teacher.timeout,
                options=engine_options(teacher, sleeping(config, device)),
            )
            opened.callback(self.remote.close, timeout=CLOSE_SECONDS)
            self.revived = Revived(self.remote, teacher.restarts, tell, lambda engine: self.restarted(engine))
            opened.callback(self.revived.end)
            self._opened = opened.pop_all()

    def wait_ready(self) -> None:
        """Until the engine answers. Raises EngineError when it does not in time, UserError when it takes too little."""
        wait_ready(self.remote, self._longest, "teacher", "teacher.args")

    def consult(self, *hosts: HostBatch) -> tuple[list[Lease], float]:
        """Have the teacher write the hidden rows of batches in one call; returns the leases that hold them and the
        seconds it took for each.

        Raises EngineError where the engine fails for good, UserError for what it cannot do with a document.
        """
        leases: list[Lease] = []
        try:
            prompts = []
            for host in hosts:
                _, shards, rows = host.batch.rows.shape
                self._reclaim()
                leases.append(lease := self.pool.lease([self._slot_rows] * shards, timeout=self._timeout))
                prompts += [
                    Prefill(*p.document.teacher_request, lease.starts[p.shard] + p.micro * rows + p.offset)
                    for p in host.documents
                ]
            start = time.perf_counter()
            if prompts:  # there are none where every response of a step is dropped
                self.revived.ask(lambda engine: self._prefill(engine, prompts))
        except BaseException:  # an interrupt too: nobody else knows of the leases
            for lease in leases:
                lease.release()
            raise
        return leases, (time.perf_counter() - start) / len(hosts)

    def view(self, lease: Lease, shape: tuple[int, int, int], *, copy: bool = False) -> Float[Array, "A G*N E"]:
        """The rows of a batch of ``shape`` [A, G, N] where the engine wrote them, or copied.

        Assembled from what each device sees of its data shard's rows, which lie in its own memory.
        """
        micro, shards, rows = shape
        sharding = NamedSharding(self.mesh, P(None, BATCH_AXES, None))
        total = (micro, shards * rows, self.pool.spec.width)
        pieces = []
        for device, index in sharding.addressable_devices_indices_map(total).items():
            view = lease.view((index[1].start or 0) // rows, (micro, rows), device.local_hardware_id)
            piece = jax.dlpack.from_dlpack(view, copy=False)
            pieces.append(jax.numpy.array(piece, copy=True) if copy else piece)
        return jax.make_array_from_single_device_arrays(total, sharding, pieces)

    def release_after(self, array: jax.Array, lease: Lease) -> None:
        """Give the lease back once ``array``, a number, is ready; where it is NaN the rows stay, to be looked at."""
        self._lent.append((array, lease))

    def wait_released(self) -> None:
        """Until nobody reads lent rows any more."""
        jax.block_until_ready([array for array, _ in self._lent])

    def gauges(self) -> dict[str, float]:
        """How full the pool is now and was at most, as shares, seconds spent waiting for room, and new starts."""
        usage = self.pool.usage()
        used, peak = usage.used / usage.rows, usage.peak / usage.rows
        return {"pool/used": used, "pool/peak": peak, "pool/waited": usage.waited, "teacher/restarts": self.restarts}

    @property
    def restarts(self) -> int:
        """How often the engine had to be started again."""
        return self.revived.count

    def kill(self) -> None:
        """End the engine at once, whatever it is doing, and for good."""
        self.revived.end()
        self.remote.kill()

    def close(self) -> None:
        """Stop the engine and free the pool; safe to call twice."""
        self._opened.close()

    def _prefill(self, engine: RemoteEngine, prompts: list[Prefill]) -> None:
        self.before()
        engine.prefill(prompts)

    def _reclaim(self) -> None:
        """Give back the rows of steps that are done; with no slot left, batches that nobody has taken yet counted too,
        wait for the oldest step: nobody else would give its rows back."""
        while self._lent and (self._lent[0][0].is_ready() or self.pool.usage().leases >= self._slots):
            array, lease = self._lent.popleft()
            if not np.isnan(array):
                lease.release()


def _gpus_of_shards(mesh: Mesh, shards: int) -> list[list[int]]:
    """For each data shard the numbers of this process's GPUs that train on it; empty where there are no GPUs."""
    gpus: list[list[int]] = [[] for _ in range(shards)]
    placed = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((shards,))
    for device, (index,) in placed.items():
        gpus[index.start or 0].append(device.local_hardware_id)
    return gpus if jax.default_backend() == "gpu" else []
