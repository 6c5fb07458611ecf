"""What `make` would do where nothing is installed: executed, with stand-ins for pip, Python and the GPU's tool."""

import os
import shutil
import subprocess
import sys

import pytest

CPU = [
    "pip --retries 1 --timeout 30 --no-deps -r requirements/cpu-torch.txt",
    "pip --no-deps -r requirements/cpu-sglang.txt",
    "pip -r requirements/cpu.txt",
    "pip --no-deps -e .",
]
QUICKSTART = "python -m kdjax.train --config configs/quickstart.yaml overwrite=true on GPU 0"
PYTHON = """echo "python $@${CUDA_VISIBLE_DEVICES:+ on GPU $CUDA_VISIBLE_DEVICES}"
case "$*" in *"import liger_kernel"*) exit 1; esac"""


@pytest.fixture
def make(root, tmp_path):
    """runs make in a copy of what it reads, with or without a GPU; gives the commands that were called"""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "requirements", tmp_path / "requirements")

    def stand_in(file, text):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    stand_in(tmp_path / ".venv" / "bin" / "python", PYTHON)

    def run(target, gpu=False):
        stand_in(tmp_path / "tools" / "nvidia-smi", f"exit {0 if gpu else 1}")
        command = ["make", "-s", target, f"PYTHON={sys.executable}", "PIP=echo pip"]
        # What runs these tests says nothing to what they run.
        outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PARALLEL", "VENV", "CUDA_VISIBLE_DEVICES"}
        environment = {name: value for name, value in os.environ.items() if name not in outer}
        environment["PATH"] = f"{tmp_path / 'tools'}:{os.environ['PATH']}"
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith(("pip ", "python "))]

    return run


def test_the_quickstart_sets_up_first_and_once(make, tmp_path):
    assert make("quickstart") == [*CPU, QUICKSTART]
    assert make("quickstart") == [QUICKSTART]
    with (tmp_path / "requirements" / "cpu.txt").open("a") as file:
        file.write("# another set\n")
    assert make("quickstart") == [*CPU, QUICKSTART]


def test_a_machine_with_a_gpu_gets_its_packages(make):
    assert make("setup", gpu=True) == ["pip -c requirements/gpu-constraints.txt -e .[gpu,test,docs,wandb]"]


def test_a_benchmark_on_a_gpu_has_ligers_loss_beside_ours(make):
    *_, liger, measured = make("gpu", gpu=True)
    assert liger == "pip --no-deps -c requirements/gpu-constraints.txt liger-kernel"
    assert measured == "python -m benchmarks.gpu"


def test_ci_runs_what_a_person_runs(make, root):
    assert make("test")[len(CPU) :] == ["python -m pytest -n 2 --dist loadfile --no-loadscope-reorder"]
    assert (root / ".ci" / "run").read_text().splitlines()[-1] == "make test"
