"""``run.json``: what a report says of a run beside its numbers, such as the machine, the versions and the samples."""

from __future__ import annotations

import json
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from kdjax.disk import write_whole

FILE = "run.json"
_PACKAGES = ("kdjax", "jax", "flax", "optax", "orbax-checkpoint", "sglang", "torch", "transformers")


def note(folder: Path, **facts: Any) -> None:
    """Add ``facts`` to the run's ``run.json``; None takes a fact away."""
    known = read_about(folder) | facts
    write_whole(folder / FILE, json.dumps({k: v for k, v in known.items() if v is not None}, indent=2))


def read_about(folder: Path) -> dict[str, Any]:
    """The facts of a run folder, as far as it has any."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def now() -> str:
    """Local time to the second, with its offset."""
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def machine() -> dict[str, Any]:
    """Devices, their kind, and the versions of what computes."""
    device = jax.devices()[0]
    return {
        "devices": f"{jax.device_count()} × {device.device_kind}",
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
