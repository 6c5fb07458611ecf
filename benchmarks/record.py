"""Writes a measurement down with all that is needed to judge it: machine, versions, commit, date."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "sglang")
ON_GPUS = ("jax-cuda13-plugin", "nvidia-cudnn-cu13", "triton", "sglang-kernel", "liger-kernel")


def record(path: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Write ``measured`` as JSON to ``path``, with ``machine``, ``versions``, ``commit`` and ``recorded`` before it."""
    result = {
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        **measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, every repetition, and (max − min) / median."""
    middle = median(seconds)
    return {"seconds": middle, "repetitions": seconds, "spread": (max(seconds) - min(seconds)) / middle}


def write_between(page: Path, mark: str, text: str) -> None:
    """Replace what stands in ``page`` between its two lines ``mark``."""
    before, _, rest = page.read_text().partition(mark)
    _, _, after = rest.partition(mark)
    page.write_text(f"{before}{mark}\n\n{text}\n\n{mark}{after}")


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
        "tunables": os.environ.get("GLIBC_TUNABLES"),
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """Name, driver, memory and highest clocks of each, as the driver says; none where it does not answer."""
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    return told.stdout.splitlines()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *ON_GPUS):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # what is not installed did not take part
    return found


def commit() -> str:
    """The commit, with a mark where the working tree differs from it in anything but results, which benchmarks before
    this one have written; outside a checkout what KDJAX_COMMIT says."""
    try:
        found = _git("rev-parse", "--short=12", "HEAD")
        if _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md"):
            found += "-dirty"
    except FileNotFoundError:  # no git there
        found = ""
    return found or os.environ.get("KDJAX_COMMIT", "unknown")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
