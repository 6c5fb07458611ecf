"""The examples run as they stand."""

import importlib.util

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
