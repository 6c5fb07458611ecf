"""Does every section of the GPU's benchmark run, and find what it claims, at tiny shapes on a CPU?"""

import json
import subprocess
import sys

import pytest

from benchmarks import quickstart, trl_gkd
from kdjax.config import load_config


def test_benchmarks_ask_for_configurations_that_hold(tmp_path):
    for more in ((), quickstart.SFT):
        assert load_config(quickstart.CONFIG, quickstart.overrides(tmp_path, 1, 7, *more)).train.steps == 7
    assert load_config(quickstart.CONFIG, trl_gkd.overrides(tmp_path, 7)).distill.kd_ratio == 1.0


@pytest.mark.full
def test_every_section_of_the_gpu_benchmark_runs_at_toy_size(root, tmp_path):
    out = tmp_path / "toy.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["pool"]["wrong_numbers"] == 0 and found["pool"]["viewed_in_place"] == found["pool"]["batches"]
    assert found["loss"]["floor"]["seconds"] > 0 and found["engine"]["tokens_per_second"] > 0
    assert all("failed" not in str(found[name]) for name in ("loss", "step", "pool", "engine"))
