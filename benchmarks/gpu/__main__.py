"""What a GPU is asked to prove: `make gpu`, or

    python -m benchmarks.gpu                       # all of it, the most telling first, in less than ten minutes
    python -m benchmarks.gpu --sections loss step
    python -m benchmarks.gpu --toy                 # tiny shapes, on a CPU too: does every section run?

A case of a section has a process of its own, so one that fails, or does not end, takes no other with it, and what is
measured is written at once, to ``benchmarks/results/<machine>.json``, and at the end into the README's table. What
there is no time for says so. A case whose numbers are wrong has failed, and then this command has too.

    loss     the fused loss in bf16, against the matrix products it cannot avoid, and Liger's where it is installed
    step     the student's training step at the shapes of Qwen3 0.6B, 1.7B and 4B: share of the peak (MFU)
    runs     whole runs with SGLang on the same GPU: prefill, transfer, step, weight sync, and in turns
    pool     hidden rows from another process by CUDA IPC: every batch checked, bandwidth against a plain copy
    sync     a student's weights into an engine: on the device by CUDA IPC, and through the host
    sharing  what sleeping engines, parked parameters and JAX's allocators give back to the driver
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.record import ROOT, gpus, record
from kdjax.engines import JAX_SHARE

# Section, case and the seconds after which it is stopped: first what the others rest on, then goals. A limit is there
# for a case that hangs; what all may take together is SECONDS.
JOBS: tuple[tuple[str, str | None, int], ...] = (
    ("pool", None, 90),
    ("step", "attention", 90),
    ("loss", "kl", 150),
    ("step", "1.7B, 4 rows, remat dots", 120),
    ("runs", "teacher", 120),
    ("runs", "off-policy, overlapped", 330),  # SGLang's kernels are compiled in it
    ("runs", "on-policy", 200),
    ("step", "4B, 2 rows, remat dots", 120),
    ("runs", "off-policy, in turns", 150),
    ("loss", "jsd", 100),
    ("loss", "liger", 100),
    ("sync", None, 120),
    ("runs", "colocated", 180),
    ("step", "1.7B, 8 rows, remat dots", 120),
    ("step", "4B, 4 rows, remat dots", 120),
    ("step", "1.7B, 8 rows, remat dots, unrolled", 240),
    ("step", "1.7B, 4 rows, remat none", 100),
    ("step", "4B, 1 rows, remat none", 100),
    ("sharing", "parameters", 60),
    ("sharing", "engine", 100),
    ("sharing", "allocators", 60),
    ("step", "0.6B, 8 rows, remat dots", 80),
    ("step", "0.6B, 8 rows, remat none", 80),
)
SECTIONS = tuple(dict.fromkeys(section for section, *_ in JOBS))
SECONDS = 585  # of all together
WORTHWHILE = 30  # fewer seconds than these tell nothing of any case
# Of the GPU, by how a step's case begins: 16 bytes a weight, gradients included, and what is saved.
NEEDS_GB = {"4B": 120, "1.7B, 8 rows": 90}
NEEDS = {  # what a case cannot do without, and the machine may lack
    ("loss", "liger"): ("liger_kernel", "liger-kernel is not installed"),
    ("runs", "colocated"): ("torch_memory_saver", "torch_memory_saver, by which SGLang sleeps, is not installed"),
    ("sharing", "engine"): ("torch_memory_saver", "torch_memory_saver, by which SGLang sleeps, is not installed"),
}


def run(section: str, case: str | None, seconds: float, toy: bool, folder: Path) -> dict[str, Any]:
    """The case in a process group of its own; ``failed`` says why there is nothing else."""
    part = folder / "part.json"
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--job", section, case or "", "--folder", str(folder)]
    environment = _environment(section, case, folder) | os.environ
    start, began = time.perf_counter(), time.time()
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(
            command + ["--toy"] * toy, cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        late = process.poll() is None
        if late:
            os.killpg(process.pid, signal.SIGKILL)  # engines notice that their trainer is gone
            process.wait()
        said.seek(0)
        end = said.read()[-4000:]
    if part.exists():
        found = json.loads(part.read_text())
    else:
        found = {"failed": f"stopped after {seconds:.0f} s\n{end}\n{written(folder, began)}" if late else end}
    return found | {"wall_seconds": time.perf_counter() - start}


def written(folder: Path, since: float) -> str:
    """The ends of the logs and metrics that a case which was stopped has written, as it cannot tell any more."""
    files = [file for kind in ("*.log", "*.jsonl") for file in folder.rglob(kind) if file.stat().st_mtime >= since]
    return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-2000:]}" for file in sorted(files))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--toy", action="store_true", help="tiny shapes, one case of a kind")
    parser.add_argument("--out", type=Path, help="where results go (default: benchmarks/results/<machine>.json)")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for all together (default: %(default)s)")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        section, case = given.job
        found = importlib.import_module(f"benchmarks.gpu.{section}").measure(case or None, given.toy, given.folder)
        (given.folder / "part.json").write_text(json.dumps(found))
        return 0
    gpu = _gpu_name()
    if gpu is None and not given.toy:
        print("error: no GPU answers here (nvidia-smi); --toy runs the same sections at tiny shapes on a CPU")
        return 2
    out = given.out or table.RESULTS / f"{re.sub('[^a-z0-9]+', '_', (gpu or 'toy').lower()).strip('_')}.json"
    measured: dict[str, Any] = {"gpu": gpu, "toy": given.toy}
    end, failed = time.monotonic() + given.seconds, False
    with tempfile.TemporaryDirectory() as folder:
        for section, case, seconds in JOBS:
            again = "remat" in (case or "") and any("remat" in known for known in measured.get(section, {}))
            if section not in given.sections or (given.toy and again):
                continue
            left = min(seconds, end - time.monotonic())
            if lacking := None if given.toy else _lacking(section, case):
                found = {"left_out": lacking}
            elif left < WORTHWHILE:
                found = {"left_out": "no time"}
            else:
                found = run(section, case, left, given.toy, Path(folder))
            failed |= "failed" in found
            measured |= {section: found} if case is None else {section: measured.get(section, {}) | {case: found}}
            record(out, measured)
            print(f"== {section} {case or ''}: {json.dumps(found, indent=1)[:3500]}", flush=True)
    if out.parent == table.RESULTS:
        table.main()
    return int(failed)


def _lacking(section: str, case: str | None) -> str | None:
    """What the machine lacks for the case."""
    module, lacking = NEEDS.get((section, case), ("", ""))
    if module and importlib.util.find_spec(module) is None:
        return lacking
    needed = next((gb for begins, gb in NEEDS_GB.items() if (case or "").startswith(begins)), None)
    if section != "step" or needed is None:
        return None
    memory = min((int(told.split(",")[2].split()[0]) * 2**20 / 1e9 for told in gpus()), default=0)
    return f"it needs {needed} GB of GPU memory, and here are {memory:.0f}" if memory < needed else None


def _environment(section: str, case: str | None, folder: Path) -> dict[str, str]:
    """What a case's process finds, unless the caller's environment says otherwise."""
    found = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),  # runs of one shape compile once
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    # A step or a loss is alone on the GPU and has it from the start, in one piece; a run sets its own share aside
    # before its engines do; anything else has torch beside it and takes what it needs.
    if section in ("loss", "step") and case != "liger":
        if not any(os.environ.get(name) for name in JAX_SHARE):
            found[JAX_SHARE[0]] = "0.95"
    elif section != "runs":
        found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if not _installed("flashinfer-python"):  # SGLang takes anything that can be imported by its name for it
        found["SGLANG_IS_FLASHINFER_AVAILABLE"] = "false"
    return found


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _gpu_name() -> str | None:
    return next((told.partition(",")[0] for told in gpus()), None)


if __name__ == "__main__":
    sys.exit(main())
