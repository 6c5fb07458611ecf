"""What `pip install .` installs: both packages with all that lies in them, and the entry point that SGLang asks for."""

import configparser
import importlib
import shutil
import subprocess
import sys
from zipfile import ZipFile

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
