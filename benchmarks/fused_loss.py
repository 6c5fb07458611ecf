"""The fused loss against unchunked logits: time of a value with its gradients, and memory.

    python -m benchmarks.fused_loss                          # all shapes; the largest takes 12 GB and ten minutes
    python -m benchmarks.fused_loss --shapes small medium

Forward KL from hidden rows and heads in float32, with gradients in the student's hidden rows and head. Three programs
take turns, so that the machine's moods meet all alike: ``linear_divergence``, the same in plain JAX on logits of all
rows, and PyTorch eager where its memory allows; their values must agree. Temporary memory is what XLA plans for the
compiled program, peak memory what the process's resident memory rose by in one call, results included.
``benchmarks.divergences`` measures the other divergences and vocabularies by the same means.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.naive import DIVERGENCES, JAX, torch_library
from benchmarks.record import record
from benchmarks.timing import SECONDS, in_turns, peak_bytes, quotient
from kdjax.losses import linear_divergence

RESULT = Path(__file__).resolve().parent / "results" / "fused_loss.json"
SHAPES = {
    "small": dict(rows=4_096, vocabulary=4_096, width=128, teacher_width=256),
    "medium": dict(rows=2_048, vocabulary=32_768, width=256, teacher_width=512),
    "large": dict(rows=4_096, vocabulary=151_936, width=1_024, teacher_width=2_048),
}
WITHOUT_TORCH = ("large",)  # its eager graph keeps more logits than this machine has memory
AGREE = 1e-3  # relative; sums of 10⁸ float32 numbers in different orders
Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def fused(divergence: str) -> Callable[..., jax.Array]:
    def program(hidden: jax.Array, weight: jax.Array, teacher_hidden: jax.Array, teacher_weight: jax.Array):
        mask = jnp.ones(len(hidden), bool)
        return linear_divergence(hidden, weight, teacher_hidden, teacher_weight, divergence=divergence, mask=mask)[0]

    return program


def naive(divergence: str) -> Callable[..., jax.Array]:
    def program(hidden: jax.Array, weight: jax.Array, teacher_hidden: jax.Array, teacher_weight: jax.Array):
        log_q, log_p = jax.nn.log_softmax(hidden @ weight), jax.nn.log_softmax(teacher_hidden @ teacher_weight)
        return DIVERGENCES[divergence](JAX, log_q, log_p).sum()

    return program


def torch_eager(divergence: str, arrays: list[np.ndarray]) -> Callable[[], float]:
    import torch  # only this comparison needs it

    of = torch_library()
    hidden, weight, teacher_hidden, teacher_weight = (torch.from_numpy(x) for x in arrays)
    hidden.requires_grad_(), weight.requires_grad_()

    def run() -> float:
        hidden.grad = weight.grad = None
        log_q = of.log_softmax(hidden @ weight)
        with torch.no_grad():
            log_p = of.log_softmax(teacher_hidden @ teacher_weight)
        value = DIVERGENCES[divergence](of, log_q, log_p).sum()
        value.backward()
        return value.item()

    return run


def inputs(rows: int, vocabulary: int, width: int, teacher_width: int) -> list[np.ndarray]:
    """Hidden rows and heads of student and teacher, whose logits have a standard deviation of 2."""
    rng = np.random.default_rng(0)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, dtype=np.float32)

    arrays = [normal(rows, width), normal(width, vocabulary) * np.float32(2 / width**0.5)]
    arrays += [normal(rows, teacher_width), normal(teacher_width, vocabulary) * np.float32(2 / teacher_width**0.5)]
    return arrays


def measure(
    divergence: str,
    shape: dict[str, int],
    with_torch: bool = True,
    limit: float = float("inf"),
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Seconds and bytes of each program at one shape. What XLA plans more than ``limit`` bytes for is not run."""
    arrays = inputs(**shape)
    placed = [jax.device_put(x) for x in arrays]
    programs: dict[str, Callable[[], float]] = {}
    result: dict[str, Any] = {"divergence": divergence, "shape": shape, "dtype": "float32"}
    for name, make in (("fused", fused), ("naive", naive)):
        compiled = jax.jit(jax.value_and_grad(make(divergence), (0, 1))).lower(*placed).compile()
        result[name] = {"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}
        if result[name]["temporary_bytes"] <= limit:
            programs[name] = lambda compiled=compiled: float(jax.block_until_ready(compiled(*placed))[0])
    if with_torch:
        programs["torch"] = torch_eager(divergence, arrays)
        result["torch"] = {}
    for name, run in programs.items():
        run()  # warms up
        result[name]["peak_bytes"] = peak_bytes(lambda name=name, run=run: result[name].update(value=run()))
    for name, timed in in_turns(programs, seconds=seconds).items():
        result[name] |= timed
    values = {name: result[name]["value"] for name in programs}
    if max(values.values()) - min(values.values()) > AGREE * abs(values["fused"]):
        raise ArithmeticError(f"{divergence} at {shape}: the programs disagree: {values}")
    if "naive" in programs:
        result["time_ratio"] = quotient(result["fused"]["repetitions"], result["naive"]["repetitions"])
    result["memory_ratio"] = result["fused"]["temporary_bytes"] / result["naive"]["temporary_bytes"]
    return result


def show(title: str, result: dict[str, Any]) -> None:
    ours = result["fused"]
    for name in ("fused", "naive", "torch"):
        it = result.get(name, {})
        if "seconds" in it:
            ratio = quotient(ours["repetitions"], it["repetitions"])["ratio"]
            ratios = f"fused / it: time {ratio:.2f}, peak memory "
            ratios += f"{ours['peak_bytes'] / max(1, it['peak_bytes']):.3f}"
            time, peak = f"{it['seconds']:9.4f} s ± {it['spread']:.0%}", f"{it['peak_bytes'] / 1e6:8.0f} MB"
            print(f"{title:24} {name:6} {time} {peak}  {ratios}", flush=True)
    print(f"{title:24} temporary memory {result['memory_ratio']:.3f} of naive", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results = {}
    for name in arguments.shapes:
        results[name] = measure("kl", SHAPES[name], with_torch=name not in WITHOUT_TORCH)
        show(name, results[name])
    record(arguments.out, results)


if __name__ == "__main__":
    main()
