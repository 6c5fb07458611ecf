"""What programs are compiled for, where that decides how they are best written."""

from __future__ import annotations

import jax
from jax import lax


def on_cpu() -> bool:
    """Whether JAX computes on the CPU by default."""
    return jax.default_backend() == "cpu"


def again(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same numbers, for something that is to be computed from them once more where memory is what a pass costs.

    On an accelerator XLA takes equal expressions for one, and writes an array of it for the later of two passes. What
    is made of these numbers it does not recognise. On a CPU, where a block stays in the cache, they come back as they
    are.
    """
    return arrays if on_cpu() else tuple(lax.optimization_barrier(arrays))
