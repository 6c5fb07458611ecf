"""How fast hidden rows get from an engine's process into a JAX array, and by how many copies.

    python -m benchmarks.transport                       # three minutes, 3 GB

Measured is transport alone. A writer process holds a batch of rows as a tensor, as the model's forward pass leaves it;
the clock runs from the trainer's word to go until the rows are a JAX array of the student's dtype here. Ways in turn:

    pool        the hook's write into shared memory, an acknowledgement, a view by DLPack
    pickle      fp16, pickle, one ZMQ socket, one copy, back to the student's dtype
    pickle, twice   the same over two sockets, as rows pass from SGLang's scheduler through the engine's parent to the
                trainer: the way KDFlow's first release moved them
    lists       SGLang's return_hidden_states: lists of Python floats, msgpack, one ZMQ socket, an array made of them
    memcpy      the C library's, as many bytes between two private buffers, by one thread: what nothing can beat

The others are spared what they would do on top: rows that carry no loss travel too and are cut away later, SGLang
hands lists on through its own event loop, KDFlow goes on through Ray's object store. On a GPU they would first copy to
the host. The writer computes nothing meanwhile, so a write may find its rows in cache, as it does behind a real pass.
Bytes are counted as the student receives them: fp16 halves what crosses the socket and gets credit for all.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import zmq

from benchmarks.record import ROOT, record
from benchmarks.timing import SECONDS, in_turns, quotient
from benchmarks.transport_side import made_rows, socket
from bridge.hidden_pool import HiddenPool

RESULT = ROOT / "benchmarks" / "results" / "transport.json"
SHAPE = dict(prompts=16, length=512, width=2_048)
# Passes that write every row anew, read off the code above and the libraries'; the pool's view is checked by address.
HOP = ("pickle", "ZMQ message", "into the socket", "out of the socket", "bytes", "unpickle")
COPIES = {
    "pool": ("the hook's write",),
    "pickle": ("to fp16", *HOP, "one array", "to the student's dtype"),
    "pickle, twice": ("to fp16", *HOP, *HOP, "one array", "to the student's dtype"),
    "lists": ("clone", "Python floats", "msgpack", *HOP[1:5], "Python floats again", "array", "JAX's array"),
    "memcpy": ("memcpy",),
}
HALF = 2e-3  # relative error of fp16; bf16 rows have fewer bits and lose none


class Trainer:
    """Receives the writer's batch in each of the ways; every method returns the array once it is ready."""

    def __init__(self, dtype: str, prompts: int, length: int, width: int, exit: ExitStack):
        self.dtype, self.count = dtype, prompts * length
        self.hidden = exit.enter_context(HiddenPool.create(rows=self.count, width=width, dtype=dtype))
        folder = exit.enter_context(tempfile.TemporaryDirectory(prefix="kdjax-", dir="/tmp"))
        self.socket = exit.enter_context(socket(folder, "direct", zmq.PULL, bind=True))
        job = json.dumps(dict(pool=asdict(self.hidden.spec), prompts=prompts, length=length, folder=folder))
        relay, self.writer = (self._start(role, job, exit) for role in ("relay", "writer"))
        self._answer("ready")
        self.buffers = [np.ones(self.count * self.hidden.spec.row_bytes, np.uint8) for _ in range(2)]

    def pool(self) -> jax.Array:
        with self.hidden.lease([self.count]) as lease:
            self._ask("pool", lease.starts[0])
            self._answer("done")
            view = lease.view(0)
            array = jax.block_until_ready(jax.dlpack.from_dlpack(view, copy=False))
            if array.unsafe_buffer_pointer() != view.address:
                raise RuntimeError("the pool's rows were copied, not viewed")
            return array

    def pickle(self, way: str = "direct") -> jax.Array:
        self._ask("pickle", way)
        rows = np.concatenate(self.socket.recv_pyobj())
        self._answer("done")
        return jax.block_until_ready(jnp.asarray(rows).astype(self.dtype))

    def lists(self) -> jax.Array:
        self._ask("lists")
        prompts = msgspec.msgpack.decode(self.socket.recv())
        self._answer("done")
        return jax.block_until_ready(
            jnp.asarray(np.concatenate([np.array(p, np.float32) for p in prompts]), self.dtype)
        )

    def memcpy(self) -> None:
        to, source = self.buffers
        ctypes.memmove(to.ctypes.data, source.ctypes.data, to.nbytes)

    def check(self) -> None:
        """Raises unless every way brings the writer's numbers. The pool's are read before it is asked again."""
        expected = np.asarray(jnp.asarray(made_rows(self.count, self.hidden.spec.width), self.dtype), np.float32)
        for name, run, tolerance in (("pool", self.pool, 0), ("lists", self.lists, 0), ("pickle", self.pickle, HALF)):
            np.testing.assert_allclose(np.asarray(run(), np.float32), expected, tolerance, tolerance, err_msg=name)

    def _start(self, role: str, job: str, exit: ExitStack) -> subprocess.Popen:
        command = [sys.executable, "-m", "benchmarks.transport_side", role, job]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        process = exit.enter_context(subprocess.Popen(command, cwd=ROOT, **pipes))
        exit.callback(process.kill)
        return process

    def _ask(self, *words: object) -> None:
        self.writer.stdin.write(" ".join(map(str, words)) + "\n")

    def _answer(self, expected: str) -> None:
        if (found := self.writer.stdout.readline().strip()) != expected:
            raise RuntimeError(f"the writer answered {found!r}, not {expected!r}")


def measure(dtype: str, shape: dict[str, int], seconds: float = SECONDS) -> dict[str, Any]:
    """Seconds, GB/s and copies of each way, and how many times slower than the pool the others are."""
    with ExitStack() as exit:
        trainer = Trainer(dtype, **shape, exit=exit)
        trainer.check()
        ways = {name: getattr(trainer, name) for name in ("memcpy", "pool", "pickle", "lists")}
        ways["pickle, twice"] = lambda: trainer.pickle("relay")
        for run in ways.values():
            run()
        size = trainer.buffers[0].nbytes
        result = {name: timed for name, timed in in_turns(ways, seconds=seconds).items()}
    for name, timed in result.items():
        timed |= {"gb_per_second": size / timed["seconds"] / 1e9, "copies": len(COPIES[name]), "passes": COPIES[name]}
        timed["times_the_pool"] = quotient(timed["repetitions"], result["pool"]["repetitions"])
        print(
            f"{dtype:8} {name:13} {timed['gb_per_second']:8.3f} GB/s ± {timed['spread']:4.0%}  "
            f"{timed['copies']:2} copies  {timed['times_the_pool']['ratio']:7.2f} × the pool's seconds",
            flush=True,
        )
    return {"shape": shape, "bytes": size, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    record(arguments.out, {dtype: measure(dtype, SHAPE) for dtype in arguments.dtypes})


if __name__ == "__main__":
    main()
