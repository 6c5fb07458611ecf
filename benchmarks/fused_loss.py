"""The fused loss against unchunked logits: time of a value with its gradients, and temporary memory.

    python -m benchmarks.fused_loss                          # all shapes; the largest takes 12 GB and ten minutes
    python -m benchmarks.fused_loss --shapes small medium

Forward KL from hidden rows and heads in float32, with gradients in the student's hidden rows and head. Three programs
take turns, so that the machine's moods meet all alike: ``linear_divergence``, the same in plain JAX on logits of all
rows, and PyTorch eager where its memory allows. Temporary memory is what XLA plans for the compiled program.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import record, spread
from kdjax.losses import linear_divergence

RESULT = Path(__file__).resolve().parent / "results" / "fused_loss.json"
SHAPES = {
    "small": dict(rows=4_096, vocabulary=4_096, width=128, teacher_width=256),
    "medium": dict(rows=2_048, vocabulary=32_768, width=256, teacher_width=512),
    "large": dict(rows=4_096, vocabulary=151_936, width=1_024, teacher_width=2_048),
}
WITHOUT_TORCH = ("large",)  # its eager graph keeps more logits than this machine has memory
REPETITIONS = 3


def fused(hidden: jax.Array, weight: jax.Array, teacher_hidden: jax.Array, teacher_weight: jax.Array) -> jax.Array:
    mask = jnp.ones(len(hidden), bool)
    return linear_divergence(hidden, weight, teacher_hidden, teacher_weight, divergence="kl", mask=mask)[0]


def naive(hidden: jax.Array, weight: jax.Array, teacher_hidden: jax.Array, teacher_weight: jax.Array) -> jax.Array:
    log_q = jax.nn.log_softmax(hidden @ weight)
    log_p = jax.nn.log_softmax(teacher_hidden @ teacher_weight)
    return (jnp.exp(log_p) * (log_p - log_q)).sum()


def torch_eager(arrays: list[np.ndarray]) -> Callable[[], float]:
    import torch  # only this comparison needs it

    hidden, weight, teacher_hidden, teacher_weight = (torch.from_numpy(x) for x in arrays)
    hidden.requires_grad_(), weight.requires_grad_()

    def run() -> float:
        hidden.grad = weight.grad = None
        log_q = torch.log_softmax(hidden @ weight, -1)
        with torch.no_grad():
            log_p = torch.log_softmax(teacher_hidden @ teacher_weight, -1)
        value = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
        value.backward()
        return value.item()

    return run


def measure(name: str) -> dict[str, Any]:
    """Seconds and temporary bytes of each program at one shape."""
    shape = SHAPES[name]
    rng = np.random.default_rng(0)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, dtype=np.float32)

    rows, vocabulary, width, teacher_width = shape.values()
    arrays = [normal(rows, width), normal(width, vocabulary) * np.float32(2 / width**0.5)]
    arrays += [normal(rows, teacher_width), normal(teacher_width, vocabulary) * np.float32(2 / teacher_width**0.5)]
    programs: dict[str, Callable[[], Any]] = {}
    result: dict[str, Any] = {"shape": shape}
    placed = [jax.device_put(x) for x in arrays]
    for program in (fused, naive):
        compiled = jax.jit(jax.value_and_grad(program, (0, 1))).lower(*placed).compile()
        programs[program.__name__] = lambda compiled=compiled: float(jax.block_until_ready(compiled(*placed))[0])
        result[program.__name__] = {"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}
    if name not in WITHOUT_TORCH:
        programs["torch"] = torch_eager(arrays)
        result["torch"] = {}
    seconds: dict[str, list[float]] = {program: [] for program in programs}
    for repetition in range(REPETITIONS + 1):  # the first warms up
        for program, run in programs.items():
            start = time.perf_counter()
            result[program]["value"] = run()
            if repetition:
                seconds[program].append(time.perf_counter() - start)
    for program, each in seconds.items():
        result[program] |= spread(each)
    result["time_ratio"] = result["fused"]["seconds"] / result["naive"]["seconds"]
    result["memory_ratio"] = result["fused"]["temporary_bytes"] / result["naive"]["temporary_bytes"]
    for program in programs:
        measured = result[program]
        memory = f"{measured['temporary_bytes'] / 1e6:8.0f} MB" if "temporary_bytes" in measured else " " * 11
        print(f"{name:7} {program:6} {measured['seconds']:8.3f} s ± {measured['spread']:.0%} {memory}", flush=True)
    print(f"{name:7} fused / naive: time {result['time_ratio']:.2f}, memory {result['memory_ratio']:.3f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    record(arguments.out, {name: measure(name) for name in arguments.shapes})


if __name__ == "__main__":
    main()
