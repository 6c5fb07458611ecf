"""The examples run as they stand."""

import importlib.util

import numpy as np
import pytest
import yaml
from run_tools import losses, write_config

from kdjax.models import load_model
from kdjax.train import main

pytestmark = pytest.mark.usefixtures("devices_as_asked")


def test_hand_written_loop(root, run_values, tmp_path, capsys):
    run_values["train"]["steps"] = 3
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_values))
    spec = importlib.util.spec_from_file_location("hand_written_loop", root / "examples" / "hand_written_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(file), "train.batch_size=2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert float(lines[2].split()[1]) < float(lines[0].split()[1])
    assert load_model(tmp_path / "run" / "export").config.hidden_size == 32


@pytest.mark.usefixtures("local_engines")
def test_an_algorithm_for_rollouts_takes_a_step(root, on_policy_values, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def length(prompt, response, row):\n    return len(response) / 8\n")
    algorithm = f"{root}/examples/own_rollout_algorithm.py:ByKind"
    on_policy_values["distill"] |= {"algorithm": algorithm, "on_policy_fraction": 0.5, "kd_ratio": 0.7}
    on_policy_values["data"]["max_len"] = 400
    on_policy_values["rollout"] |= {"reward": f"{reward}:length", "n_samples": 2, "importance_clip": 2.0}
    on_policy_values["train"]["steps"] = 1
    assert main(["--config", str(write_config(tmp_path, on_policy_values))]) == 0
    run = on_policy_values["output"]
    assert len(losses(run)) == 1 and np.isfinite(losses(run)).all()
    assert losses(run, "ce")[0] > 1 and losses(run, "kd")[0] > 0  # rows of both kinds were there
    assert losses(run, "rollout/k3")[0] < 1e-6 and losses(run, "rollout/weight")[0] == pytest.approx(1, abs=1e-3)


@pytest.mark.usefixtures("local_engines")
@pytest.mark.parametrize(
    ("distill", "part"),
    [
        ({"loss": "examples/five_line_loss.py:power", "loss_args": {"order": 0.5}}, "kd"),
        ({"algorithm": "examples/own_algorithm.py:WithFeatures"}, "feature"),
    ],
    ids=["loss", "algorithm"],
)
def test_a_configuration_trains_with_them(root, run_values, tmp_path, monkeypatch, distill, part):
    monkeypatch.chdir(root)
    run_values["train"] = {"steps": 2, "batch_size": 4}
    run_values["data"]["eval"] = []
    assert main(["--config", str(write_config(tmp_path, run_values | {"distill": distill}))]) == 0
    assert len(losses(run_values["output"])) == 2 and min(losses(run_values["output"], part)) > 0
