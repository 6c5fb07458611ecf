"""Hidden rows out of a real engine: kdjax's pool against SGLang's own ``return_hidden_states``.

    python -m benchmarks.transport_engine                # two minutes, two cores, 6 GB

One SGLang engine with random weights serves kdjax, whose hook writes the rows into the pool; another like it is asked
for hidden states by SGLang's own call, and for none, to know what all else takes: it must generate a token, without
which SGLang returns no hidden states. Timed is the whole call, until the rows are a JAX array of the student's dtype.
The three take turns; each engine has one thread. The model has a single layer, so that the way of the rows is not lost
in the time of its products.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.record import ROOT, record, spread
from benchmarks.shapes import qwen3
from benchmarks.timing import ROUNDS, quotient
from benchmarks.transport_engine_side import VOCABULARY, ids_of
from bridge.client import start_engine
from bridge.engine import Prefill
from bridge.hidden_pool import HiddenPool
from kdjax.models import export_hf, load_model

RESULT = ROOT / "benchmarks" / "results" / "transport_engine.json"
SHAPE = dict(prompts=16, length=256, width=1_024)
WARM = 2
WAYS = ("pool", "lists", "nothing")
APART = 1e-4  # of rows by both ways: other engines, other batches


def save_model(folder: Path, width: int) -> Path:
    shape = qwen3(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        eos_token_id=1,
    )
    return export_hf(load_model(None, config=shape, init="random"), folder)


class Own:
    """Through kdjax: the engine's hook writes into leased rows, which JAX views."""

    def __init__(self, model: Path, prompts: int, length: int, width: int, exit: ExitStack):
        self._ids, self._rows = ids_of(prompts, length), prompts * length
        self._pool = exit.enter_context(HiddenPool.create(rows=self._rows, width=width, dtype="float32"))
        start = dict(kind="sglang", pool=self._pool, log=model.parent / "pool.log", device="cpu", threads=1)
        self._engine = exit.enter_context(start_engine(model, **start))

    @contextmanager
    def rows(self) -> Iterator[jax.Array]:
        """float32 [rows, width], for as long as the lease lasts"""
        with self._pool.lease([self._rows]) as lease:
            first, length = lease.starts[0], len(self._ids[0])
            asked = [Prefill(ids, ((0, length),), first + i * length) for i, ids in enumerate(self._ids)]
            self._engine.prefill(asked)
            yield jax.block_until_ready(jax.dlpack.from_dlpack(lease.view(0), copy=False))

    def seconds(self) -> float:
        start = time.perf_counter()
        with self.rows():
            return time.perf_counter() - start


class Sglangs:
    """Through SGLang's own call, in the process that holds its engine, as whoever uses SGLang alone has it."""

    def __init__(self, model: Path, prompts: int, length: int, exit: ExitStack):
        job = json.dumps(dict(model=str(model), prompts=prompts, length=length))
        command = [sys.executable, "-m", "benchmarks.transport_engine_side", job]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._log = model.parent / "lists.log"
        log = exit.enter_context(self._log.open("w"))
        self._process = exit.enter_context(subprocess.Popen(command, cwd=ROOT, stderr=log, **pipes))
        exit.callback(self._process.kill)

    def ask(self, what: str) -> str:
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{what}\n")
        while line := self._process.stdout.readline():
            if line.startswith("answer "):
                return line.removeprefix("answer ").strip()
        raise RuntimeError(f"the engine that is asked by SGLang's own call ended:\n{self._log.read_text()[-2000:]}")


def measure(shape: dict[str, int], rounds: int = ROUNDS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kdjax-", dir="/tmp") as folder, ExitStack() as exit:
        model = save_model(Path(folder) / "model", shape["width"])
        theirs = Sglangs(model, shape["prompts"], shape["length"], exit)
        ours = Own(model, **shape, exit=exit)
        found = Path(folder) / "rows.npy"
        theirs.ask(f"lists {found}")
        with ours.rows() as rows:
            np.testing.assert_allclose(np.asarray(rows), np.load(found), APART, APART)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(WARM + rounds):
            took = {way: ours.seconds() if way == "pool" else float(theirs.ask(way)) for way in WAYS}
            for way in WAYS if number >= WARM else ():
                seconds[way].append(took[way])
    size = shape["prompts"] * shape["length"] * shape["width"] * 4
    print(", ".join(f"{way} {spread(each)['seconds']:.3f} s" for way, each in seconds.items()), flush=True)
    return {
        "shape": shape,
        "dtype": "float32",
        "bytes": size,
        "seconds": {way: spread(each) for way, each in seconds.items()},
        "lists_of_the_pool": quotient(seconds["lists"], seconds["pool"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    record(given.out, measure(SHAPE, given.rounds))


if __name__ == "__main__":
    main()
