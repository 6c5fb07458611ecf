"""What `make` would do where nothing is installed: executed, with stand-ins for pip, Python and the GPU's tool."""

import os
import shutil
import subprocess

import pytest

CPU = [
    "pip --retries 1 --timeout 30 --no-deps -r requirements/cpu-torch.txt",
    "pip --no-deps -r requirements/cpu-sglang.txt",
    "pip -r requirements/cpu.txt",
    "pip --no-deps -e .",
    "python -W ignore -m bridge.torchvision_hook",
]
GPU = ["pip -c requirements/gpu-constraints.txt -e .[gpu,test,docs,wandb]"]
TRAIN = "python -m kdjax.train --config configs/quickstart.yaml"
QUICKSTART = f"{TRAIN} overwrite=false on GPU 0"
ANEW = "made anew"
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
    stand_in(tmp_path / ".venv" / "bin" / "pip", "exit 1")

    # the Python that makes an environment says so, and answers every question with yes
    stand_in(tmp_path / "tools" / "python9", f'test "$1" = -c || echo "{ANEW}"')
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags: avx512f avx512_bf16 amx_bf16\n")

    def run(target, *more, driver=None):
        stand_in(tmp_path / "tools" / "nvidia-smi", "exit 1" if driver is None else f"echo {driver}")
        command = ["make", "-s", target, f"PYTHON={tmp_path / 'tools' / 'python9'}", "PIP=echo pip"]
        command += [f"CPUINFO={cpuinfo}", *more]
        # What runs these tests says nothing to what they run.
        outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PARALLEL", "VENV", "CUDA_VISIBLE_DEVICES"}
        outer |= {"PYTHON", "DEVICE"}
        environment = {name: value for name, value in os.environ.items() if name not in outer}
        environment["PATH"] = f"{tmp_path / 'tools'}:{os.environ['PATH']}"
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.strip() for line in done.stdout.splitlines() if line.startswith(("pip ", "python ", ANEW))]

    return run


def test_the_quickstart_sets_up_first_and_once(make, tmp_path):
    assert make("quickstart") == [*CPU, QUICKSTART]
    assert make("quickstart") == [QUICKSTART]
    with (tmp_path / "requirements" / "cpu.txt").open("a") as file:
        file.write("# another set\n")
    assert make("quickstart") == [*CPU, QUICKSTART]


def test_an_interrupted_quickstart_goes_on_and_a_finished_one_begins_anew(make, tmp_path):
    assert make("quickstart")[-1] == f"{TRAIN} overwrite=false on GPU 0"
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "result.json").touch()
    assert make("quickstart")[-1] == f"{TRAIN} overwrite=true on GPU 0"


def test_a_cpu_without_bfloat16_gets_a_teacher_in_what_it_is_fast_at(make, tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("flags: avx2\n")
    assert make("quickstart", f"CPUINFO={plain}")[-1] == f"{TRAIN} overwrite=false teacher.dtype=auto on GPU 0"
    assert "dtype" not in make("quickstart", f"CPUINFO={plain}", driver="580.65.06")[-1]


def test_a_machine_with_a_gpu_gets_its_packages(make):
    assert make("setup", driver="580.65.06") == GPU
    assert make("setup", driver="580.65.06") == []


def test_a_gpu_whose_driver_is_too_old_is_left_alone(make):
    assert make("setup", driver="575.57.08") == CPU


def test_an_environment_for_another_kind_of_device_is_made_anew(make):
    assert make("setup", "DEVICE=cpu", driver="580.65.06") == CPU
    assert make("setup", driver="580.65.06") == [ANEW, *GPU]


def test_an_environment_that_was_interrupted_before_it_had_pip_is_made_anew(make, tmp_path):
    (tmp_path / ".venv" / "bin" / "pip").unlink()
    assert make("setup") == [ANEW, *CPU]


def test_a_benchmark_on_a_gpu_has_ligers_loss_beside_ours(make):
    *_, liger, measured = make("gpu", driver="580.65.06")
    assert liger == "pip --no-deps -c requirements/gpu-constraints.txt liger-kernel"
    assert measured == "python -m benchmarks.gpu"


def test_ci_runs_what_a_person_runs(make, root):
    assert make("test")[len(CPU) :] == ["python -m pytest -n 2 --dist loadfile --no-loadscope-reorder"]
    assert (root / ".ci" / "run").read_text().splitlines()[-1] == "make test"
