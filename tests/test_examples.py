"""The examples run as they stand."""

import importlib.util

import pytest
import yaml

from kdjax.models import load_model

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
