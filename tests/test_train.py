"""Whole runs from the command line: the real engine, resuming, eight devices, what a person is told."""

import glob
import json
import os
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from processes import family, gone
from run_tools import Watcher, servers, start, write_config
from safetensors.numpy import load_file

from bridge.client import RemoteEngine
from kdjax.config import from_dict, to_dict
from kdjax.errors import UserError
from kdjax.models import load_model
from kdjax.progress import Display
from kdjax.train import main
from kdjax.training.loop import train
from kdjax.training.metrics import read_metrics
from kdjax.training.sources import Stream

pytestmark = pytest.mark.usefixtures("devices_as_asked")


def losses(folder, key="loss"):
    return [record[key] for record in read_metrics(folder / "metrics.jsonl") if key in record]


def without_teacher(run_values):
    run_values["teacher"] = {}
    run_values["data"]["tokenizer"] = run_values["student"]["path"]


def go(run_values, **changes):
    return train(from_dict({**run_values, **changes}), Display(quiet=True))


def test_sglang_teacher_from_text_to_export(run_values, tmp_path, capfd, monkeypatch):
    """The main job: a live SGLang engine, rows through the pool, an export that transformers answers from."""
    run_values["teacher"]["engine"] = "sglang"
    run_values["train"]["steps"] = 12
    run_values["log"] |= {"sample_prompt": "How many?", "samples": 1, "sample_tokens": 4, "report": True}
    run_values["checkpoint"]["check_export"] = True
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_values))
    left, close = [], RemoteEngine.close

    def look_and_close(engine, **deadline):
        if engine.pid is not None:
            server = engine._server
            pool = [] if engine.pool is None else [engine.pool.spec.path]
            left.append((family(engine.pid), [server.folder, *server.leftovers, *pool]))
        close(engine, **deadline)

    monkeypatch.setattr(RemoteEngine, "close", look_and_close)
    began = time.perf_counter()
    assert main(["--config", str(file), "log.tensorboard=true"]) == 0
    elapsed = time.perf_counter() - began
    shown, error = capfd.readouterr()
    assert error == ""
    _, (teacher, _) = left  # the first was transformers', which read the export
    assert len(teacher) >= 3
    for pids, files in left:
        assert all(map(gone, pids)) and not [file for file in files if Path(file).exists()]
    for words in ("student", "teacher (sglang)", "preflight", "compile", "export", "report"):
        assert re.search(rf"^{re.escape(words)} +\d+\.\d s$", shown, re.M), words
    for words in ("held-out at step 0", "step 12/12", "Q: How many?", "agreement"):
        assert words in shown
    assert re.search(r"^\W*kl\W+(\d+\.\d{4}\W+){5}$", shown, re.M)  # before, during and after, side by side
    run = tmp_path / "run"
    kd = losses(run, "kd")
    assert len(kd) == 12 and np.mean(kd[-3:]) < np.mean(kd[:3])
    assert losses(run, "eval/kl")[-1] < losses(run, "eval/kl")[0]
    assert list((run / "tensorboard").iterdir())
    assert len(losses(run, "grad_norm")) == len(losses(run, "seconds/student")) == 12
    seconds_add_up(read_metrics(run / "metrics.jsonl"), elapsed)
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


def test_a_run_shows_its_own_lines_and_nothing_else(run_values, tmp_path):
    """in a process of its own, where nobody takes libraries' warnings away first; report and check of the export too"""
    run_values["teacher"]["engine"] = "transformers"
    run_values["train"] |= {"steps": 2, "eval_every": None}
    run_values["checkpoint"]["check_export"] = True
    run_values["log"] |= {"tensorboard": True, "report": True}
    process = start("--config", write_config(tmp_path, run_values))
    shown, error = process.communicate(timeout=300)
    assert process.returncode == 0 and error == ""
    assert "report: " in shown and not re.search(r"warn|deprecat|^[WEI]\d{4} ", shown, re.I | re.M)


def seconds_add_up(records, elapsed):
    """a step's to the whole of it, and steps and stages to what a clock beside the run has measured"""
    stages = sum(value for record in records for name, value in record.items() if name.startswith("stage/"))
    steps = [record for record in records if "seconds/step" in record]
    for record in steps:
        parts = sum(record[f"seconds/{name}"] for name in ("waiting", "transfer", "student"))
        assert record["seconds/teacher"] > 0 and parts == pytest.approx(record["seconds/step"])
    assert sum(record["seconds/student"] for record in steps) > 0
    assert 0.6 * elapsed < stages + sum(record["seconds/step"] for record in steps) <= elapsed


@pytest.mark.parametrize("engine", ["sft", "transformers"])
def test_interrupted_equals_uninterrupted_to_the_bit(run_values, tmp_path, monkeypatch, engine):
    rows, evaluation = [], Stream.evaluation
    monkeypatch.setattr(Stream, "evaluation", lambda *a: rows.append(evaluation(*a)) or rows[-1])
    if engine == "sft":
        without_teacher(run_values)
    else:
        run_values["distill"] = {"algorithm": "feature"}  # it owns a projector, which is saved and restored as well
    run_values["checkpoint"] |= {"save_every": 2, "keep": 5}
    whole = go(run_values, output=str(tmp_path / "whole"))
    assert len(rows) == 1  # the teacher's rows of held-out data are computed once, for three evaluations
    go(run_values, output=str(tmp_path / "cut"))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")  # as if it had been killed after step 4
    shutil.rmtree(tmp_path / "cut" / "export")
    resumed = go(run_values, output=str(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert losses(tmp_path / "whole", "feature") == losses(tmp_path / "cut", "feature")
    a, b = load_model(whole.export), load_model(resumed.export)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))
    assert list(whole.evaluations) == [0, 3, 6] and whole.evaluations == resumed.evaluations


def test_eight_devices_give_the_losses_of_one(run_values, sharded_values, tmp_path):
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
    seen = []
    mine = f"/dev/shm/kdjax-*-{os.getpid()}-*"
    before, living = set(glob.glob(mine)), servers()  # other tests' engines live on
    display = Watcher({1: lambda: seen.append(len(servers()))})
    train(from_dict(run_values), display)
    assert seen == [len(living) + 1] and servers() == living and set(glob.glob(mine)) <= before


def test_exit_code_2_and_one_line(run_values, tmp_path, capsys):
    run_values["student"]["path"] = str(tmp_path / "nowhere")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(to_dict(from_dict(run_values))))
    assert main(["--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "nowhere" in error


def test_layers_of_the_teacher_become_a_student_with_its_tokenizer_and_template(run_values, tmp_path, local_engines):
    run_values["student"] = {"init": "layers", "layers": [1]}
    run_values["train"] |= {"steps": 2, "learning_rate": 1e-9, "eval_every": None, "eval_rows": 1}
    result = go(run_values)
    made, teacher = (
        load_file(f"{folder}/model.safetensors") for folder in (result.export, run_values["teacher"]["path"])
    )
    assert json.loads((result.export / "config.json").read_text())["num_hidden_layers"] == 1
    assert {name for name in made if "layers.0." in name} and not [name for name in made if "layers.1." in name]
    for name in made:
        cut_from = teacher[name.replace("layers.0.", "layers.1.")]
        assert made[name].shape == cut_from.shape and np.abs(made[name] - cut_from).max() < 1e-7, name
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (result.export / name).read_bytes() == (Path(run_values["teacher"]["path"]) / name).read_bytes()
