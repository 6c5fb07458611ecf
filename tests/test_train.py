"""Whole runs from the command line: the real engine, resuming, eight devices, what a person is told."""

import glob
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest
import yaml

from kdjax.config import from_dict, to_dict
from kdjax.errors import UserError
from kdjax.models import load_model
from kdjax.train import main
from kdjax.training.loop import train
from kdjax.training.metrics import read_metrics
from kdjax.training.progress import Display

pytestmark = pytest.mark.usefixtures("devices_as_asked")


def losses(folder, key="loss"):
    return [record[key] for record in read_metrics(folder / "metrics.jsonl") if key in record]


def without_teacher(run_values):
    run_values["teacher"] = {}
    run_values["data"]["tokenizer"] = run_values["student"]["path"]


def go(run_values, **changes):
    return train(from_dict({**run_values, **changes}), Display(quiet=True))


def test_sglang_teacher_from_text_to_export(run_values, tmp_path, capsys):
    """The main job: a live SGLang engine, rows through the pool, an export that transformers answers from."""
    run_values["teacher"]["engine"] = "sglang"
    run_values["train"]["steps"] = 12
    run_values["log"] |= {"sample_prompt": "How many?", "samples": 1, "sample_tokens": 4, "report": True}
    run_values["checkpoint"]["check_export"] = True
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_values))
    assert main(["--config", str(file), "log.tensorboard=true"]) == 0
    shown = capsys.readouterr().out
    for words in ("teacher (sglang)", "preflight", "held-out at step 0", "step 12/12", "Q: How many?", "agreement"):
        assert words in shown
    run = tmp_path / "run"
    kd = losses(run, "kd")
    assert len(kd) == 12 and np.mean(kd[-3:]) < np.mean(kd[:3])
    assert losses(run, "eval/kl")[-1] < losses(run, "eval/kl")[0]
    assert list((run / "tensorboard").iterdir())
    assert len(losses(run, "grad_norm")) == len(losses(run, "seconds/student")) == 12
    assert 0 < max(losses(run, "pool/used")) <= losses(run, "pool/peak")[-1] <= 1
    page = (run / "report.html").read_text()
    for words in ("How many?", "KL(teacher ‖ student)", "finished at step 12", "teacher (sglang)"):
        assert words in page
    exported = load_model(run / "export")
    assert exported.config.hidden_size == 32
    assert from_dict(yaml.safe_load((run / "config.yaml").read_text())) == from_dict(
        run_values | {"log": run_values["log"] | {"tensorboard": True}}
    )
    # The reference engine on the same data and seed gives the same losses.
    run_values["teacher"]["engine"] = "transformers"
    run_values["output"] = str(tmp_path / "reference")
    run_values["checkpoint"]["check_export"], run_values["log"]["samples"] = False, 0
    go(run_values)
    assert losses(run) == pytest.approx(losses(tmp_path / "reference"), rel=1e-4)


@pytest.mark.parametrize("engine", ["sft", "transformers"])
def test_interrupted_equals_uninterrupted_to_the_bit(run_values, tmp_path, engine):
    if engine == "sft":
        without_teacher(run_values)
    else:
        run_values["distill"] = {"algorithm": "feature"}  # it owns a projector, which is saved and restored as well
    run_values["checkpoint"] |= {"save_every": 2, "keep": 5}
    whole = go(run_values, output=str(tmp_path / "whole"))
    go(run_values, output=str(tmp_path / "cut"))
    for step in ("6",):  # as if it had been killed after step 4
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / step)
    shutil.rmtree(tmp_path / "cut" / "export")
    resumed = go(run_values, output=str(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert losses(tmp_path / "whole", "feature") == losses(tmp_path / "cut", "feature")
    a, b = load_model(whole.export), load_model(resumed.export)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))
    assert whole.evaluations[6] == resumed.evaluations[6]


def test_eight_devices_give_the_losses_of_one(run_values, tmp_path):
    run_values["train"]["batch_size"] = 8
    go(run_values, output=str(tmp_path / "one"))
    go(run_values, output=str(tmp_path / "eight"), mesh={"data": 2, "fsdp": 2, "tensor": 2})
    one, eight = losses(tmp_path / "one"), losses(tmp_path / "eight")
    assert len(one) == 6
    assert one == pytest.approx(eight, rel=1e-5)


def test_accumulation_gives_the_same_run(run_values, tmp_path):
    without_teacher(run_values)
    go(run_values, output=str(tmp_path / "one"))
    run_values["train"]["accumulate"] = 2
    go(run_values, output=str(tmp_path / "two"))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


def test_another_configuration_is_refused(run_values):
    without_teacher(run_values)
    go(run_values)
    with pytest.raises(UserError, match="differs in train.learning_rate"):
        go(run_values | {"train": run_values["train"] | {"learning_rate": 1e-3}})
    with pytest.raises(UserError, match="resume is false"):
        go(run_values, checkpoint={"resume": False})


def test_the_pool_is_gone_and_the_engine_with_it(run_values):
    mine = f"/dev/shm/kdjax-*-{os.getpid()}-*"
    before = set(glob.glob(mine))  # other tests' engines live on
    go(run_values)
    assert set(glob.glob(mine)) <= before
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert run_values["output"] not in listed


def test_exit_code_2_and_one_line(run_values, tmp_path, capsys):
    run_values["student"]["path"] = str(tmp_path / "nowhere")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(to_dict(from_dict(run_values))))
    assert main(["--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "nowhere" in error
