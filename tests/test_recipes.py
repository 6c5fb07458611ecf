"""The recipes parse, every line of their table too; each runs at toy size, and so does each file in configs/."""

import json
import re
import shlex

import numpy as np
import pytest

from kdjax.config import load_config
from kdjax.models import load_model
from kdjax.progress import Display
from kdjax.train import parse
from kdjax.training.loop import train
from kdjax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("devices_as_asked", "local_engines")
FILES = ("qwen3_30b_a3b_to_4b", "qwen3_4b_sft", "qwen3_30b_a3b_to_4b_on_policy")


def test_the_table_names_every_file_and_parses(root, monkeypatch):
    monkeypatch.chdir(root)
    folder = root / "configs" / "recipes"
    commands = re.findall(r"`(--config [^`]+)`", (folder / "README.md").read_text())
    configs = [parse(shlex.split(command)) for command in commands]
    assert {shlex.split(command)[1] for command in commands} == {
        f"configs/recipes/{p.name}" for p in folder.glob("*.yaml")
    }
    assert len({config.output for config in configs}) == len(configs) == 8
    assert all(config.data.max_len == 4096 for config in configs)
    for config in configs:
        devices = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
        assert devices == 8 and config.train.batch_size // config.train.accumulate % devices == 0
    assert parse([*shlex.split(commands[0]), "teacher.quantization=fp8"]).teacher.quantization == "fp8"


SMALLER = ("train.batch_size=4", "train.steps=2", "train.eval_every=2", "train.eval_rows=2", "log.every=1",
           "log.tensorboard=false", "log.report=false", "checkpoint.check_export=false")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_it_runs_at_toy_size(root, tiny_teacher, tmp_path, name):
    """Paths and sizes are replaced; numbers' types, rematerialisation, sharding and the rest stay the recipe's."""
    rows = (root / "examples" / "data" / "gsm8k_train.jsonl").read_text().splitlines()[:24]
    file = tmp_path / "rows.jsonl"
    turns = [{"human": row["question"], "gpt": row["answer"]} for row in map(json.loads, rows)]
    file.write_text(
        "".join(json.dumps({"conversations": [{"from": w, "value": v} for w, v in t.items()]}) + "\n" for t in turns)
    )
    smaller = [f"output={tmp_path}/run", f"student.path={tiny_teacher}", "data.max_len=64", "mesh.fsdp=2", *SMALLER]
    smaller += ["student.scan_layers=false"]  # see conftest.py: sharded_values
    for side in ("train", "eval"):
        smaller += [f"data.{side}.0.path={file}", f"data.{side}.0.split=null"]
    config = load_config(root / "configs" / "recipes" / f"{name}.yaml")
    if config.distill.on_policy_fraction:
        smaller += ["data.max_len=128", "train.accumulate=2", "rollout.engines=2", "rollout.prompts=4"]
        smaller += ["rollout.engine=transformers", "rollout.max_new_tokens=8"]
    if config.teacher.path is not None:
        smaller += [f"teacher.path={tiny_teacher}", "teacher.engine=transformers"]
    config = load_config(root / "configs" / "recipes" / f"{name}.yaml", smaller)
    result = train(config, Display(quiet=True))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert ("eval/kl" in records[0]) == (config.teacher.path is not None)
    assert load_model(result.export, abstract=True).config.hidden_size == 48


@pytest.mark.parametrize(
    "name",
    ["on_policy", *(pytest.param(name, marks=pytest.mark.full) for name in ("self_distill", "context_distill"))],
)
def test_a_configuration_for_a_cpu_runs_at_toy_size(root, tiny_teacher, tmp_path, monkeypatch, name):
    monkeypatch.chdir(root)
    smaller = [f"output={tmp_path}/run", f"student.path={tiny_teacher}", f"teacher.path={tiny_teacher}", "mesh.data=1"]
    smaller += ["teacher.engine=transformers", "rollout.engine=transformers", "rollout.max_new_tokens=8", *SMALLER]
    smaller += ["teacher.update_every=1"] if name == "self_distill" else []
    config = load_config(root / "configs" / f"{name}.yaml", smaller)
    result = train(config, Display(quiet=True))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 2 and np.isfinite([record["loss"] for record in steps]).all()
    assert {"eval/kl", "eval/ce"} <= records[0].keys()
    assert all(("rollout/k3" in record) == (name != "context_distill") for record in steps)
    assert all(record.get("rollout/k3", 0) < 1e-6 for record in steps)
    exports = [load_model(folder, abstract=True) for folder in result.export.parent.glob("export*")]
    assert len(exports) == 1 + (name == "self_distill")
