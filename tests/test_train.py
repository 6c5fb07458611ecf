"""Whole runs from the command line: the real engine, resuming, eight devices, what a person is told."""

import json
import shutil

import jax
import numpy as np
import pytest
import yaml

from kdjax.config import from_dict, to_dict
from kdjax.errors import UserError
from kdjax.models import export_hf, load_model
from kdjax.train import main
from kdjax.training.loop import train
from kdjax.training.progress import Display

GSM8K = {"format": "prompt_response", "prompt_key": "question", "response_key": "answer"}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_teacher(root, tmp_path_factory):
    """A random Qwen3 with the examples' tokenizer: enough to be followed."""
    shape = yaml.safe_load((root / "configs" / "quickstart_teacher.yaml").read_text())["student"]["config"]
    shape |= {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 24, "initializer_range": 0.2}  # fmt: skip
    folder = tmp_path_factory.mktemp("teacher") / "model"
    export_hf(load_model(None, config=shape, init="random", seed=9), folder, tokenizer=root / "examples" / "tokenizer")
    return folder


@pytest.fixture
def values(root, tiny_teacher, tmp_path):
    data = root / "examples" / "data"
    return {
        "output": str(tmp_path / "run"),
        "student": {"path": str(tiny_teacher), "init": "random", "config": dict(SMALL)},
        "teacher": {"path": str(tiny_teacher), "engine": "transformers"},
        "data": {
            "train": [{"path": str(data / "gsm8k_train.jsonl"), "max_samples": 200} | GSM8K],
            "eval": [{"path": str(data / "gsm8k_test.jsonl")} | GSM8K],
            "max_len": 256,
            "packing_bins": 8,
        },
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 3e-3, "eval_rows": 8, "eval_every": 3},
        "mesh": {"data": 1},
        "log": {"every": 1, "tensorboard": False},
    }


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A run takes the devices that are there; these see one, unless they say otherwise."""
    monkeypatch.setattr("kdjax.training.sources.make_mesh", _mesh_of_size)


def _mesh_of_size(data, fsdp, tensor):
    from kdjax.sharding import make_mesh

    return make_mesh(data, fsdp, tensor, devices=jax.devices()[: max(1, data * fsdp * tensor)])


def losses(folder, key="loss"):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def go(values, **changes):
    return train(from_dict({**values, **changes}), Display(quiet=True))


def test_sglang_teacher_from_text_to_export(values, tmp_path, capsys):
    """The main job: a live SGLang engine, rows through the pool, an export that transformers answers from."""
    values["teacher"]["engine"] = "sglang"
    values["train"]["steps"] = 12
    values["log"] |= {"sample_prompt": "How many?", "sample_tokens": 4}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["--config", str(file), "log.tensorboard=true"]) == 0
    shown = capsys.readouterr().out
    for words in ("teacher (sglang)", "preflight", "held-out at step 0", "step 12/12", "Q: How many?", "agreement"):
        assert words in shown
    run = tmp_path / "run"
    kd = losses(run, "kd")
    assert len(kd) == 12 and np.mean(kd[-3:]) < np.mean(kd[:3])
    assert losses(run, "eval/kl")[-1] < losses(run, "eval/kl")[0]
    assert list((run / "tensorboard").iterdir())
    exported = load_model(run / "export")
    assert exported.config.hidden_size == 32
    assert from_dict(yaml.safe_load((run / "config.yaml").read_text())) == from_dict(values | {
        "log": values["log"] | {"tensorboard": True}})
    # The reference engine on the same data and seed gives the same losses.
    values["teacher"]["engine"] = "transformers"
    values["output"] = str(tmp_path / "reference")
    go(values)
    assert losses(run) == pytest.approx(losses(tmp_path / "reference"), rel=1e-4)


@pytest.mark.parametrize("engine", ["sft", "transformers"])
def test_interrupted_equals_uninterrupted_to_the_bit(values, tmp_path, engine):
    if engine == "sft":
        values["teacher"] = {}
        values["data"]["tokenizer"] = values["student"]["path"]
    values["checkpoint"] = {"save_every": 2, "keep": 5}
    whole = go(values, output=str(tmp_path / "whole"))
    go(values, output=str(tmp_path / "cut"))
    for step in ("6",):  # as if it had been killed after step 4
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / step)
    shutil.rmtree(tmp_path / "cut" / "export")
    resumed = go(values, output=str(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    a, b = load_model(whole.export), load_model(resumed.export)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))
    assert whole.evaluations[6] == resumed.evaluations[6]


def test_eight_devices_give_the_losses_of_one(values, tmp_path):
    values["train"]["batch_size"] = 8
    go(values, output=str(tmp_path / "one"))
    go(values, output=str(tmp_path / "eight"), mesh={"data": 2, "fsdp": 2, "tensor": 2})
    one, eight = losses(tmp_path / "one"), losses(tmp_path / "eight")
    assert len(one) == 6
    assert one == pytest.approx(eight, rel=1e-5)


def test_a_checkpoint_of_eight_devices_goes_on_with_one(values, tmp_path):
    values["train"]["batch_size"] = 8
    values["checkpoint"] = {"save_every": 3, "keep": 5}
    go(values, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    run = tmp_path / "run"
    first = losses(run)
    shutil.rmtree(run / "checkpoints" / "6")
    shutil.rmtree(run / "export")
    go(values, mesh={"data": 1})
    assert losses(run) == pytest.approx(first, rel=1e-5)


def test_accumulation_gives_the_same_run(values, tmp_path):
    go(values, output=str(tmp_path / "one"))
    values["train"]["accumulate"] = 2
    go(values, output=str(tmp_path / "two"))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


def test_another_configuration_is_refused(values):
    go(values)
    with pytest.raises(UserError, match="differs in train.learning_rate"):
        go(values | {"train": values["train"] | {"learning_rate": 1e-3}})
    with pytest.raises(UserError, match="resume is false"):
        go(values, checkpoint={"resume": False})


def test_the_pool_is_gone_and_the_engine_with_it(values):
    import glob
    import subprocess

    go(values)
    assert [p for p in glob.glob("/dev/shm/kdjax-*")] == []
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert values["teacher"]["path"] not in listed


def test_exit_code_2_and_one_line(values, tmp_path, capsys):
    values["student"]["path"] = str(tmp_path / "nowhere")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(to_dict(from_dict(values))))
    assert main(["--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "nowhere" in error
