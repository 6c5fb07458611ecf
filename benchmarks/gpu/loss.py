"""The fused loss in bf16 at H = 4,096, V = 128,256, 8,192 tokens, against the matrix products that it cannot avoid.

kl, jsd   the products alone and the fused loss at several sizes of its chunks take turns; first its value and gradients
          of some rows are held against float32 logits of them, and where they differ there is nothing to time
liger     Liger's fused linear JSD (2410.10989), where it can be imported, and ours take turns
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.fused_loss import fused, naive
from benchmarks.record import spread
from benchmarks.timing import SECONDS, in_turns, quotient
from kdjax.losses import linear_divergence

PRODUCTS = {"logits": "nd,dv->nv", "hidden gradient": "nv,dv->nd", "head gradient": "nd,nv->dv"}
DEFAULT = "chunks as chosen"
CHECKED, VALUES_AGREE, GRADIENTS_AGREE = 256, 2e-3, 2e-2  # rows, relative; a gradient is written in bf16
# Rows of a chunk by case; None: the library's choice.
CHUNKS = {"kl": (None, 1024), "jsd": (None,), "liger": (None,)}


def measure(case: str, toy: bool, folder: Path) -> dict[str, Any]:
    rows, width, vocabulary = (256, 64, 4096) if toy else (8192, 4096, 128_256)
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, teacher_hidden = (jax.random.normal(key, (rows, width), jnp.bfloat16) for key in keys[:2])
    head, teacher_head = (jax.random.normal(k, (width, vocabulary), jnp.bfloat16) * width**-0.5 for k in keys[2:4])
    arrays = hidden, head, teacher_hidden, teacher_head
    # Drawn, as everything else: products of constants need less power, and so run faster than those of numbers.
    slope = jax.random.normal(keys[4], (rows, vocabulary), jnp.bfloat16) * 1e-3
    mask = jnp.ones(rows, bool)
    divergence = "jsd" if case == "liger" else case
    gaps = {} if case == "liger" else checked(arrays, divergence)
    programs: dict[str, Callable[[], Any]] = {}

    operands = {"logits": (hidden, head), "hidden gradient": (slope, head), "head gradient": (hidden, slope)}
    for name, spec in PRODUCTS.items():
        product = jax.jit(lambda a, b, spec=spec: jnp.einsum(spec, a, b))
        programs[name] = lambda f=product, pair=operands[name]: jax.block_until_ready(f(*pair))

    planned = {}
    for chunk in CHUNKS[case]:

        def run(*arrays: jax.Array, chunk: int | None = chunk) -> jax.Array:
            return linear_divergence(*arrays, divergence=divergence, mask=mask, chunk_rows=chunk)[0]

        name = DEFAULT if chunk is None else f"chunks of {chunk}"
        compiled = jax.jit(jax.value_and_grad(run, (0, 1))).lower(*arrays).compile()
        programs[name] = lambda f=compiled: jax.block_until_ready(f(*arrays))
        memory = compiled.memory_analysis()
        planned[name] = memory.temp_size_in_bytes + memory.output_size_in_bytes

    if liger := Liger(rows, width, vocabulary) if case == "liger" and not toy else None:
        programs["liger"] = liger
    for program in programs.values():
        program()
    timed = in_turns(programs, seconds=0.0 if toy else SECONDS)

    products = {name: timed.pop(name) for name in PRODUCTS}
    logits, *gradients = (products[name]["repetitions"] for name in PRODUCTS)
    floors = [2 * forward + sum(backward) for forward, *backward in zip(logits, *gradients, strict=True)]
    for name, result in timed.items():
        result["times_the_floor"] = quotient(result["repetitions"], floors)
        result["bytes_above_inputs"] = planned[name] if name in planned else liger.peak_bytes()
    flops = 8 * rows * width * vocabulary
    floor = spread(floors) | {"products": products}
    return {
        "divergence": divergence,
        "shapes": {"rows": rows, "width": width, "vocabulary": vocabulary, "dtype": "bfloat16"},
        "relative_gaps": gaps,
        "floor": floor | {"tflops": flops / floor["seconds"] / 1e12},
        "fused": timed,
    }


def checked(arrays: tuple[jax.Array, ...], divergence: str) -> dict[str, float]:
    """How far the fused loss of the first rows and its gradients lie from those of float32 logits.

    A gradient's distance is ‖found − expected‖ / ‖expected‖. Raises ArithmeticError where one is too large.
    """
    hidden, head, teacher_hidden, teacher_head = arrays
    few = hidden[:CHECKED], head, teacher_hidden[:CHECKED], teacher_head
    with jax.default_matmul_precision("highest"):
        exact = tuple(x.astype(jnp.float32) for x in few)
        expected, slopes = jax.jit(jax.value_and_grad(naive(divergence), (0, 1)))(*exact)
    value, found = jax.jit(jax.value_and_grad(fused(divergence), (0, 1)))(*few)
    gaps = {"value": float(abs(value - expected) / expected)}
    for name, one, other in zip(("hidden", "head"), found, slopes, strict=True):
        gaps[name] = float(jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other))
    for name, apart in gaps.items():
        if not apart <= (VALUES_AGREE if name == "value" else GRADIENTS_AGREE):
            raise ArithmeticError(f"the fused {divergence} and that of float32 logits are {apart:.1e} apart: {name}")
    return gaps


class Liger:
    """The same loss by Liger's kernels, forward and backward, on random inputs of its own."""

    def __init__(self, rows: int, width: int, vocabulary: int) -> None:
        import torch
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale

        self._cuda, self._loss = torch.cuda, LigerFusedLinearJSD(jsd_beta=0.5)
        self._student = [drawn(rows, width), drawn(vocabulary, width, scale=width**-0.5)]
        self._teacher = [drawn(rows, width), drawn(vocabulary, width, scale=width**-0.5)]
        for x in self._student:
            x.requires_grad_()

    def __call__(self) -> None:
        for x in self._student:
            x.grad = None
        self._loss(*self._student, *self._teacher, None).backward()
        self._cuda.synchronize()

    def peak_bytes(self) -> int:
        """How far torch's memory rises above the inputs, gradients included."""
        for x in self._student:
            x.grad = None
        before = self._cuda.memory_allocated()
        self._cuda.reset_peak_memory_stats()
        self()
        return self._cuda.max_memory_allocated() - before
