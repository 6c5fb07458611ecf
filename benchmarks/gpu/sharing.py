"""What colocation rests on, judged by the memory that the driver calls free.

parameters   a student's to pinned host memory and back: seconds, GB/s, and what that gives the driver
engine       SGLang asleep and awake again: seconds, what that gives the driver, and whether it still says the same
allocators   what JAX's allocators give back of an array that is deleted; cuda_async is the one that might
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.runs import SGLANG, teacher_folder
from benchmarks.record import ROOT, spread
from benchmarks.timing import ROUNDS
from bridge import cuda
from bridge.client import start_engine

AGREE = 1e-3  # nats: what an engine may say otherwise after it slept
ALLOCATORS = ("default", "cuda_async", "platform")
GIBIBYTES = 4
TRIAL = """
import sys
import jax, jax.numpy as jnp
from benchmarks.gpu.sharing import free
jax.block_until_ready(jnp.zeros(8) + 1)
before = free()
x = jax.block_until_ready(jnp.ones((int(sys.argv[1]), 2**20), jnp.uint8))
held = free()
del x
print(before - held, free() - held)
"""


def measure(case: str, toy: bool, folder: Path) -> dict[str, Any]:
    return {"parameters": parameters, "engine": engine, "allocators": allocators}[case](toy, folder)


def free() -> int:
    """Bytes that the driver calls free on the first GPU; without one, those of the host."""
    if cuda.gpus():
        return cuda.memory(0)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def allocators(toy: bool, folder: Path) -> dict[str, Any]:
    """Bytes ``taken`` from the driver by an array, and ``given_back`` once it is deleted, by allocator."""
    size = 64 if toy else GIBIBYTES * 1024
    found: dict[str, Any] = {"bytes": size * 2**20}
    for name in ALLOCATORS:
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_ALLOCATOR": name}
        command = [sys.executable, "-c", TRIAL, str(size)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            found |= {name: {}, "failed": f"{name}: {done.stderr[-1000:]}"}
        else:
            found[name] = dict(zip(("taken", "given_back"), map(int, done.stdout.split()), strict=True))
    return found


def parameters(toy: bool, folder: Path) -> dict[str, Any]:
    import jax

    from benchmarks.gpu.step import make

    step = make("1.7B", "none", toy, teacher_width=64, offload=("parameters",))
    size = sum(x.nbytes for x in jax.tree.leaves(step.state["params"]))
    step.park()  # the first time pins the host's memory
    step.unpark()
    found = _round_trips(step.park, step.unpark)
    for way in found.values():
        way["bytes_per_second"] = size / way["seconds"]
    return {"bytes": size, "allocator": os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default"), **found}


def engine(toy: bool, folder: Path) -> dict[str, Any]:
    teacher, log = teacher_folder(folder, toy), folder / "sleeper.log"
    before = free()
    if toy:  # it sleeps on a CPU too, and frees nothing
        options: dict[str, Any] = {"kind": "transformers", "dtype": "float32"}
    else:
        saver = {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
        options = {"dtype": "bfloat16", "options": SGLANG | saver | {"mem_fraction_static": 0.3}}
    with start_engine(teacher, log=log, **options) as running:
        ids = [np.random.default_rng(0).integers(1, 4000, 200).astype(np.int32)]
        (said,) = running.score(ids)
        taken = before - free()
        found = _round_trips(running.sleep, running.wake)
        gap = float(np.abs(running.score(ids)[0] - said).max())
    if not gap <= AGREE:
        raise RuntimeError(f"the engine woke up another: log-probabilities differ by {gap}")
    return {"taken": taken, "gap": gap, **found}


def _round_trips(sleep: Callable[[], None], wake: Callable[[], None]) -> dict[str, Any]:
    """Seconds of either way, and the bytes that the driver has more of after ``sleep``, less of after ``wake``."""
    seconds: dict[str, list[float]] = {"sleep": [], "wake": []}
    gained: dict[str, list[int]] = {"sleep": [], "wake": []}
    for _ in range(ROUNDS):
        for name, act in (("sleep", sleep), ("wake", wake)):
            before, start = free(), time.perf_counter()
            act()
            seconds[name].append(time.perf_counter() - start)
            gained[name].append(free() - before)
    return {name: spread(seconds[name]) | {"driver_gained": gained[name]} for name in seconds}
