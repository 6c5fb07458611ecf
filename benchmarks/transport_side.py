"""The engine's side of ``benchmarks.transport``, without a model: holds a batch of hidden rows and sends it as asked.

python -m benchmarks.transport_side writer JOB: reads a way on each line of standard input, answers on standard output.
python -m benchmarks.transport_side relay JOB: passes pickled rows on, as the process between engine and trainer does.
JOB is JSON: ``pool`` (a PoolSpec's fields), ``prompts``, ``length``, ``folder`` of the sockets. No jax in here.
"""

import json
import pickle
import sys
from typing import Any

import msgspec
import numpy as np
import torch
import zmq

from bridge.hidden_pool import PoolSpec
from bridge.pool_rows import PoolRows


def made_rows(count: int, width: int) -> np.ndarray:
    """float32 [count, width], the same in every process"""
    return np.random.default_rng(0).standard_normal((count, width), np.float32)


def socket(folder: str, name: str, kind: int, bind: bool = False) -> zmq.Socket:
    made = zmq.Context.instance().socket(kind)
    (made.bind if bind else made.connect)(f"ipc://{folder}/{name}")
    return made


class Writer:
    """Sends the same batch again and again. The tensor stands where the model's output would."""

    def __init__(self, job: dict[str, Any]):
        torch.set_num_threads(1)
        spec = PoolSpec.of(job["pool"])
        count = job["prompts"] * job["length"]
        hidden = torch.from_numpy(made_rows(count, spec.width)).to(getattr(torch, spec.dtype))
        self.prompts = hidden.split(job["length"])
        self.length, self.rows = job["length"], PoolRows(spec)
        self.direct, self.relayed = (socket(job["folder"], name, zmq.PUSH) for name in ("direct", "relay"))

    def pool(self, row: str) -> None:
        """what the hook does behind the model's forward pass: one write a prompt, then the stamps"""
        for index, hidden in enumerate(self.prompts):
            self.rows.write(int(row) + index * self.length, hidden)
        self.rows.finish()

    def lists(self) -> None:
        """SGLang 0.5.23's return_hidden_states: nested lists of Python floats, msgpack, ZMQ"""
        self.direct.send(msgspec.msgpack.encode([hidden.cpu().clone().tolist() for hidden in self.prompts]))

    def pickle(self, way: str) -> None:
        """fp16 arrays, pickled, over ZMQ"""
        halves = [hidden.half().cpu().numpy() for hidden in self.prompts]
        (self.relayed if way == "relay" else self.direct).send_pyobj(halves, protocol=pickle.HIGHEST_PROTOCOL)


def main(role: str, job: dict[str, Any]) -> None:
    if role == "relay":
        taken, passed = socket(job["folder"], "relay", zmq.PULL, bind=True), socket(job["folder"], "direct", zmq.PUSH)
        while True:
            passed.send_pyobj(taken.recv_pyobj(), protocol=pickle.HIGHEST_PROTOCOL)
    writer = Writer(job)
    print("ready", flush=True)
    for line in sys.stdin:
        way, *words = line.split()
        getattr(writer, way)(*words)
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
