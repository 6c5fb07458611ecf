"""The trainer's hold on an engine in another process: it starts, its calls have deadlines, its death is noticed."""

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from bridge.checkpoint import read_facts
from bridge.cuda import gpus
from bridge.dlpack import ALIGNMENT
from bridge.engine import Completion, EngineKind, EngineSpec, Health, Prefill, Sampling, check_ids
from bridge.errors import EngineError, PromptError
from bridge.hidden_pool import HiddenPool
from bridge.leaving import FOLDER_PREFIX
from bridge.weight_sync import DeviceBucket, WeightBucket

LOG_LINES = 15  # quoted when an engine fails
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def start_engine(
    model: str | Path,
    *,
    log: str | Path,
    kind: EngineKind = "sglang",
    pool: HiddenPool | None = None,
    dtype: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    mem_fraction: float | None = None,
    options: Mapping[str, Any] | None = None,
    start_timeout: float = 600.0,
    call_timeout: float = 600.0,
    wait: bool = True,
) -> "RemoteEngine":
    """start an engine in a process of its own

    model: a HF folder. log: the file that takes all the engine prints. pool: where `prefill` puts rows, whose dtype the
    model then computes in; without a pool `dtype` says it, or config.json does. device: "cpu", "cuda", or "auto" for
    CUDA where a GPU answers. threads, seed, mem_fraction, options: as in `EngineSpec`. wait: return when it is ready;
    with False return at once, and `wait_ready`, or the first call, waits for what is left of `start_timeout` seconds.
    call_timeout: the deadline of every call that names none.

    Raises ValueError for a model folder or pool that does not fit, EngineError where the engine does not start.
    """
    folder = Path(model).resolve()
    facts = read_facts(folder)
    if pool is not None and pool.spec.width != facts.width:
        raise ValueError(f"{model} has hidden rows of {facts.width} numbers, the pool's have {pool.spec.width}")
    if pool is not None and dtype not in (None, pool.spec.dtype):
        raise ValueError(f"dtype {dtype} was asked for and the pool holds {pool.spec.dtype}: they must agree")
    spec = EngineSpec(
        kind=kind,
        model=str(folder),
        dtype=dtype or (facts.dtype if pool is None else pool.spec.dtype),
        device=default_device() if device == "auto" else device,
        pool=None if pool is None else pool.spec,
        threads=threads,
        seed=seed,
        mem_fraction=mem_fraction,
        options=dict(options or {}),
    )
    engine = RemoteEngine(spec, pool, Path(log), start_timeout, call_timeout)
    if wait:
        engine.wait_ready()
    return engine


class RemoteEngine:
    """An `Engine` hosted by `python -m bridge.server`. Calls from several threads run one after the other.

    Every call takes `timeout` seconds (None: the engine's `call_timeout`). An engine that misses a deadline is stopped,
    since it might still write into rows that are soon leased to someone else; `restart` starts it again.
    """

    def __init__(self, spec: EngineSpec, pool: HiddenPool | None, log: Path, start_timeout: float, call_timeout: float):
        self.spec, self.pool, self.log = spec, pool, log
        self.start_timeout, self.call_timeout = start_timeout, call_timeout
        self._turn, self._watch_turn = threading.RLock(), threading.Lock()
        self._server: _Server | None = None
        self._closed = False
        self.max_tokens: int | None = None  # a prompt may have, with what is generated behind it; once it is ready
        self._buckets: dict[tuple[int, int | None], WeightBucket] = {}
        self._launch()

    @property
    def pid(self) -> int | None:
        """the server's process id, None once it is stopped"""
        return None if self._server is None else self._server.process.pid

    def wait_ready(self) -> None:
        """return when the engine takes calls; raises EngineError where it fails or `start_timeout` passes"""
        self._ready("wait_ready")

    def prefill(self, prompts: Sequence[Prefill], timeout: float | None = None) -> None:
        """raises ValueError unless every row lies in a lease, EngineError if a row did not arrive"""
        if self.pool is None:
            raise ValueError("prefill needs a pool: give one to start_engine")
        ranges = [(prompt.row, prompt.count) for prompt in prompts]
        self.pool.expect(ranges)
        self._call("prefill", (list(prompts),), timeout)
        missing = self.pool.missing(ranges)
        if lost := [index for index, count in enumerate(missing) if count]:
            raise EngineError(
                f"{self._name()} said it wrote all rows, and {sum(missing)} are missing, first {missing[lost[0]]} of "
                f"{ranges[lost[0]][1]} rows of prompt {lost[0]}: was its prefix cache on, or its graphs?"
            )

    def score(
        self, prompts: Sequence[Int32[np.ndarray, " T"]], timeout: float | None = None
    ) -> list[Float32[np.ndarray, " T-1"]]:
        return self._call("score", (_checked(prompts),), timeout)

    def generate(
        self, prompts: Sequence[Int32[np.ndarray, " T"]], sampling: Sampling, timeout: float | None = None
    ) -> list[Completion]:
        return self._call("generate", (_checked(prompts), sampling), timeout)

    def update_weights(
        self,
        tensors: Iterable[tuple[str, Any]],
        *,
        version: int,
        bucket_bytes: int = 256 * 2**20,
        timeout: float | None = None,
        label: object = None,
        gpu: int | None = None,
    ) -> None:
        """replace all weights, about `bucket_bytes` at a time through shared memory; completions then carry `version`

        `label` is the caller's word for these weights: `holds` says it from now on, and None after a start.
        gpu: NumPy arrays come through host memory; with the number of a GPU, JAX arrays that lie on it through a bucket
        there, which an engine on any GPU of this host may read. The bucket is kept until the engine is stopped.

        Raises EngineError that names the tensor where one is unknown, misshaped, sent twice or missing. The engine then
        refuses other calls until an update succeeds or it is restarted.
        """
        sizes = [4 * prod(shape) for shape in read_facts(Path(self.spec.model)).tensors.values()]  # 4: at most float32
        size = max([1, *sizes, min(bucket_bytes, sum(sizes) + ALIGNMENT * len(sizes))])
        with self._turn:
            self.holds = None
            self.wait_ready()  # the start has a deadline of its own
            timeout = self.call_timeout if timeout is None else timeout
            deadline = time.monotonic() + timeout  # of all together
            self._call("weights_begin", (), timeout, deadline)
            bucket = self._bucket(-(-size // ALIGNMENT) * ALIGNMENT, gpu)
            for entries in bucket.fill(tensors):
                try:
                    self._call("weights_bucket", (bucket.spec, entries), timeout, deadline)
                except EngineError as error:
                    names = " to ".join(dict.fromkeys([entries[0].name, entries[-1].name]))
                    raise EngineError(f"it broke off at {names}: {error}") from None
            self._call("weights_end", (version,), timeout, deadline)
            self.holds = label

    def sleep(self, tags: Sequence[str] | None = None, timeout: float | None = None) -> None:
        self._call("sleep", (tags,), timeout)

    def wake(self, tags: Sequence[str] | None = None, timeout: float | None = None) -> None:
        self._call("wake", (tags,), timeout)

    def health(self, timeout: float = 10.0) -> Health:
        """how the engine is, also while it is busy; raises EngineError when it does not answer"""
        server = self._running("health")
        if not server.ready:  # once it is, the turn of a call in progress must not be waited for
            self.wait_ready()
        with self._watch_turn:
            self._send(server, server.watch, None, timeout, "health")
            return self._receive(server, server.watch, time.monotonic() + timeout, "health", timeout, plain=True)

    def restart(self) -> None:
        """stop what is left of the engine and start it anew, with the weights of its model folder, version 0

        Raises EngineError where it does not start, and once it is closed or killed.
        """
        with self._turn:
            self._stop()
            self._launch()
            self.wait_ready()

    def close(self, timeout: float = 20.0) -> None:
        """end the engine's processes for good; what does not end within `timeout` seconds is killed. Idempotent."""
        self._closed = True
        mine = self._turn.acquire(timeout=timeout)  # else a call hangs in another thread, and ends with the engine
        try:
            server = self._server
            if mine and server is not None and server.ready:
                try:
                    self._call("close", (), timeout)
                    server.process.wait(timeout)
                except (EngineError, subprocess.TimeoutExpired):
                    pass  # it is gone already, or is made to go now
            self._stop()
        finally:
            if mine:
                self._turn.release()

    def kill(self) -> None:
        """end the engine's processes at once and for good, whoever waits for an answer: that call raises EngineError"""
        self._closed = True
        self._stop()

    def __enter__(self) -> "RemoteEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _launch(self) -> None:
        self.holds: object = None
        server = self._server = _Server(self.spec, self.log)
        if self._closed:  # by another thread, which had no server to end yet
            self._stop()
            raise EngineError(f"{self._name()} is closed")
        self._send(server, server.work, self.spec, self.start_timeout, "starting")

    def _stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.destroy()
        self._let_go()

    def _bucket(self, size: int, gpu: int | None) -> WeightBucket:
        """the one of this size, made if need be: as long as the server lives it may read from any that there was"""
        if (size, gpu) not in self._buckets:
            self._buckets[size, gpu] = WeightBucket(size) if gpu is None else DeviceBucket(size, gpu)
        return self._buckets[size, gpu]

    def _let_go(self) -> None:
        """free the buckets, which nobody reads any more"""
        while self._buckets:
            self._buckets.popitem()[1].close()

    def _name(self) -> str:
        return f"engine {self.spec.kind} {Path(self.spec.model).name}"

    def _running(self, what: str) -> "_Server":
        if self._server is None:
            raise EngineError(f"{self._name()} is stopped, so it cannot answer {what}: restart it")
        return self._server

    def _ready(self, what: str) -> "_Server":
        with self._turn:
            server = self._running(what)
            if not server.ready:
                deadline = server.began + self.start_timeout
                answer = self._receive(server, server.work, deadline, "starting", self.start_timeout)
                self.max_tokens, leftovers = answer
                server.leftovers += leftovers
                server.ready = True
            return server

    def _call(self, method: str, args: tuple, timeout: float | None, deadline: float | None = None) -> Any:
        """the answer within `timeout` seconds, or by the `deadline` that several calls of that timeout share"""
        timeout = self.call_timeout if timeout is None else timeout
        with self._turn:
            server = self._ready(method)
            deadline = time.monotonic() + timeout if deadline is None else deadline
            self._send(server, server.work, (method, args), timeout, method)
            return self._receive(server, server.work, deadline, method, timeout)

    def _send(self, server: "_Server", end: Connection, message: Any, timeout: float, what: str) -> None:
        try:
            server.limit(end, timeout)
            end.send(message)
        except BlockingIOError:
            self._missed(what, timeout)
        except OSError:  # the other end is gone
            self._died(server, what)

    def _receive(
        self, server: "_Server", end: Connection, deadline: float, what: str, timeout: float, plain: bool = False
    ) -> Any:
        left = max(0.0, deadline - time.monotonic())
        ready = wait([end, server.death], left)
        if not ready:
            self._missed(what, timeout)
        try:
            if end not in ready and not end.poll():
                raise EOFError
            server.limit(end, max(1.0, deadline - time.monotonic()))
            answer = end.recv()
        except BlockingIOError:
            self._missed(what, timeout)
        except (EOFError, OSError):
            self._died(server, what)
        if plain:
            return answer
        status, value = answer
        if status == "prompt":
            raise PromptError(value)
        if status == "misuse":
            raise ValueError(value)
        if status == "failed":
            if what == "starting":
                self._stop()
                raise EngineError(f"{self._name()} did not start: {value}\n{self._tail()}")
            raise EngineError(f"{self._name()}: {value} (log: {self.log})")
        return value

    def _missed(self, what: str, timeout: float) -> None:
        self._stop()
        raise EngineError(
            f"{self._name()} gave no answer to {what} within {timeout:g} s and was stopped\n{self._tail()}"
        ) from None

    def _died(self, server: "_Server", what: str) -> None:
        status = server.destroy() or "stopped by its trainer"
        self._server = None
        raise EngineError(f"{self._name()} died ({status}) during {what}\n{self._tail()}") from None

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f"last lines of {self.log}:", *lines])


class _Server:
    """The server's process, the trainer's ends of its two socket pairs, and what to remove when it is gone."""

    def __init__(self, spec: EngineSpec, log: Path):
        self.began, self.ready = time.monotonic(), False
        self.leftovers: list[str] = []
        # SGLang's own sockets lie in a folder that goes with the server. Their paths must stay below 108 bytes.
        base = tempfile.gettempdir()
        self.folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base if len(base) < 50 else "/tmp")
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
        theirs = [pair[1].fileno() for pair in pairs]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bridge.server", *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=theirs,
                env=_environment(spec, self.folder),
                start_new_session=True,
            )
        self.death = os.pidfd_open(self.process.pid)
        for _, other in pairs:
            other.close()
        self.work, self.watch = (Connection(pair[0].detach()) for pair in pairs)
        self.destroy = weakref.finalize(
            self, _destroy, self.process, self.death, self.folder, self.leftovers, os.getpid()
        )

    def limit(self, end: Connection, seconds: float) -> None:
        """let neither a full nor a half-read socket block longer than this"""
        whole, rest = divmod(max(seconds, 0.001), 1)
        value = struct.pack("ll", int(whole), int(rest * 1e6))
        with socket.socket(fileno=os.dup(end.fileno())) as handle:
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)


def _destroy(process: subprocess.Popen, death: int, folder: str, leftovers: list[str], owner: int) -> str:
    """kill the server and its children, remove what they leave; returns how the server ended"""
    if os.getpid() != owner:  # a fork of the trainer that exits
        return ""
    if process.poll() is None:
        process.kill()
    process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its children are in its group and outlive it by a moment
    except ProcessLookupError:
        pass
    for path in leftovers:
        Path(path).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    os.close(death)
    code = process.returncode
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _environment(spec: EngineSpec, folder: str) -> dict[str, str]:
    """the server's environment: this package importable, private temporary files, threads as asked"""
    root = str(Path(__file__).resolve().parent.parent)
    environment = dict(os.environ, TMPDIR=folder, PYTHONUNBUFFERED="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    if spec.threads is not None:
        environment.update(dict.fromkeys(THREAD_VARIABLES, str(spec.threads)))
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait by spinning take the trainer's cores
    return environment


def _checked(prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    for ids in prompts:
        check_ids(ids)
    return list(prompts)


def default_device() -> str:
    """cuda where the NVIDIA driver shows this process a GPU (CUDA_VISIBLE_DEVICES may hide them all), else cpu"""
    return "cuda" if gpus() else "cpu"
