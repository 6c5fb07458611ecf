"""Where engines run, and what follows from it: what ``auto`` computes in, and how they sleep. None of it starts JAX."""

from __future__ import annotations

from typing import Any

import jax

from bridge.client import default_device
from kdjax.config import Config


def engine_device() -> str:
    """``cuda`` where an NVIDIA driver answers, unless ``JAX_PLATFORMS`` tells JAX to keep off GPUs; else ``cpu``."""
    platforms = jax.config.jax_platforms
    return "cpu" if platforms and not {"cuda", "gpu"} & set(platforms.split(",")) else default_device()


def engine_dtype(dtype: str, device: str) -> str:
    """What an engine computes in: ``auto`` is float32 on a CPU, where bfloat16 is slow, and bfloat16 on a GPU."""
    return {"cpu": "float32", "cuda": "bfloat16"}[device] if dtype == "auto" else dtype


def sleeping(config: Config, device: str) -> dict[str, Any]:
    """SGLang's arguments for engines that sleep: what they give up of the GPU's memory waits on the host."""
    if not config.colocate or device == "cpu":
        return {}
    return {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
