"""What `pip install .` installs: both packages with all that lies in them, and the entry point that SGLang asks for.
What a machine without a network is given instead."""

import configparser
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ENTRY = "bridge.sglang_platform:activate"


def test_a_wheel_holds_both_packages_and_the_entry_point(root, tmp_path):
    source = tmp_path / "source"  # building writes beside what it builds
    source.mkdir()
    files = set()
    for package in ("kdjax", "bridge"):
        copied = shutil.copytree(root / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
        files |= {str(path.relative_to(source)) for path in copied.rglob("*") if path.is_file()}
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    command = [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("kdjax-*.whl")
    with ZipFile(file) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
        read = configparser.ConfigParser()
        read.read_string(wheel.read(points).decode())
    assert inside == files and "kdjax/reporting/page.html" in files
    assert dict(read["sglang.srt.platforms"]) == {"kdjax_cpu": ENTRY}
    module, _, function = ENTRY.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_an_export_opens_in_a_program_that_knows_nothing_of_kdjax(root):
    """Transformers imports torchvision for a model class, and its wheel needs help beside a CPU torch."""
    program = "from transformers import AutoModelForCausalLM as A; print(type(A.from_pretrained('.')).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root / "examples/teacher", capture_output=True, text=True
    )
    assert done.stdout == "Qwen3ForCausalLM\n", done.stderr


def test_the_pack_for_a_machine_without_a_network_is_whole(root):
    """what it names is pinned, and asks for nothing but itself and what comes with JAX, torch and transformers"""
    script = (root / "benchmarks" / "gpu" / "pack.sh").read_text()
    lines = re.search(r"packages=\((.*?)\)", script, re.S)[1].splitlines()
    named = {canonicalize_name(name) for line in lines if "#" not in line for name in line.split()}
    pins = (root / "requirements" / "gpu-constraints.txt").read_text().splitlines()
    assert named <= {canonicalize_name(pin.partition("==")[0]) for pin in pins}
    there = {"jax", "jaxlib", "numpy", "torch", "transformers", "ml-dtypes", "packaging"}
    for name in sorted(named):
        asked = [Requirement(text) for text in requires(name) or []]
        asked = {canonicalize_name(one.name) for one in asked if not one.marker or one.marker.evaluate({"extra": ""})}
        assert asked <= named | there, name
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    kdjax = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    elsewhere = {"safetensors", "tokenizers", "huggingface-hub", "jinja2"}  # with transformers and torch
    for_sources_and_reports = {"datasets", "tensorboardx", "matplotlib"}
    assert kdjax <= named | there | elsewhere | for_sources_and_reports
