"""The configuration: defaults, overrides, and one clear line for each fault."""

import dataclasses

import pytest
import yaml

from kdjax.config import from_dict, load_config, reference, to_dict, to_yaml
from kdjax.errors import UserError
from kdjax.train import main, parse

MINIMAL = {"student": {"path": "s"}, "data": {"train": [{"path": "rows.jsonl"}]}}
ARGS = ["student.path=s", "data.train=[{path: rows.jsonl}]"]


def test_yaml_then_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("student: {path: s}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 5, learning_rate: 1e-3}\n")
    config = load_config(file, ["train.steps=7", "data.train.0.path=b.jsonl", "train.betas=[0.9, 0.95]"])
    assert config.train.steps == 7
    assert config.train.learning_rate == 1e-3
    assert config.train.betas == (0.9, 0.95)
    assert config.data.train[0].path == "b.jsonl"


def test_round_trip_and_frozen():
    config = from_dict(MINIMAL)
    assert from_dict(to_dict(config)) == config == from_dict(yaml.safe_load(to_yaml(config)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3


@pytest.mark.parametrize(
    ("distill", "loss"),
    [
        ({}, "kl"),
        ({"on_policy_fraction": 1.0}, "rkl"),
        ({"on_policy_fraction": 0.1}, "rkl"),
        ({"on_policy_fraction": 1.0, "loss": "jsd"}, "jsd"),
        ({"loss": "rkl"}, "rkl"),
    ],
)
def test_the_divergence_that_nobody_named_is_reverse_with_rollouts_and_saved(distill, loss):
    config = from_dict(MINIMAL | {"teacher": {"path": "t"}, "distill": distill})
    assert config.distill.loss == loss == yaml.safe_load(to_yaml(config))["distill"]["loss"]


def test_a_teacher_with_another_template_and_loss_on_the_template():
    data = MINIMAL["data"] | {"train_on": "all", "teacher_template_args": {"enable_thinking": False}}
    with pytest.raises(UserError, match="data.train_on=all puts loss on the chat template's own tokens"):
        from_dict(MINIMAL | {"data": data})


def test_every_key_is_documented():
    keys = list(reference())
    assert len(keys) > 60
    assert [name for name, _, _, meaning in keys if not meaning] == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=3", ["train.step", "train.steps"]),
        ("learning_rate=3", ["learning_rate", "train.learning_rate"]),
        ("train.steps=many", ["train.steps: input should be a valid integer", "got 'many'"]),
        ("train.steps=0", ["train.steps", "greater than or equal to 1"]),
        ("distill.kd_ratio=1.5", ["distill.kd_ratio", "less than or equal to 1"]),
        ("student.dtype=fp16", ["student.dtype", "float32", "bfloat16"]),
        ("train.accumulate=3", ["train.accumulate=3", "train.batch_size=8"]),
        ("train.min_lr=1", ["train.min_lr", "train.learning_rate"]),
        ("train.keep_best=true", ["train.eval_every"]),
        ("train.eval_every=5", ["data.eval"]),
        ("student.init=layers", ["student.layers"]),
        ("student.config={hidden_size: 8}", ["student.init=random"]),
        ("train=5", ["train", "5"]),
        ("train.betas=[0.9, 1.0]", ["train.betas", "[0, 1)"]),
        ("train.steps", ["train.steps", "key=value"]),
        ("data.train=[{pth: a}]", ["data.train.0.pth", "path"]),
        ("data.train=[]", ["data.train", "at least one source"]),
        ("train.steps=[1", ["not YAML"]),
        ("mesh.fsdp=0", ["mesh.fsdp=0", "1 or more", "-1"]),
        ("mesh.tensor=0", ["mesh.tensor=0"]),
        ("mesh.tensor=-2", ["mesh.tensor", "greater than or equal to -1"]),
    ],
)
def test_a_fault_names_key_and_mend(override, words):
    with pytest.raises(UserError) as error:
        load_config(None, [*ARGS, override])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [1, 2", ["run.yaml:", "not valid YAML"]),
        (b"train: {steps: 1}\ndata: {}\ntrain: {batch_size: 2}\n", ["run.yaml:3", "'train' is there twice"]),
        (b"- 1\n- 2\n", ["expected a mapping", "list"]),
        (b"", ["expected a mapping"]),
        (b"\xff\xfe\x00\x01", ["cannot be read"]),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, words):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_config(file)
    for word in [str(file), *words]:
        assert word in str(error.value)


def test_cudnn_wants_bfloat16_and_even_lengths():
    asked = ["student.attention=cudnn", "student.dtype=bfloat16", "data.max_len=512"]
    assert load_config(None, [*ARGS, *asked]).student.attention == "cudnn"
    for fault, words in (
        ("data.max_len=511", "even data.max_len, not 511"),
        ("student.dtype=float32", "dtype=bfloat16"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(None, [*ARGS, *asked, fault])


def test_a_group_of_which_all_is_commented_out_has_its_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("student: {path: s}\ndata: {train: [{path: rows.jsonl}]}\nteacher:\n  # path: t\nlog:\n")
    assert load_config(file).teacher.path is None and load_config(file).log.every
    assert load_config(file, ["teacher.path=t"]).teacher.path == "t"


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="nowhere.yaml: no such configuration file"):
        load_config("nowhere.yaml")


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and [name for name, *_ in reference() if f"\n  {name}: " not in shown] == []


def test_the_printed_configuration_can_be_run_again(tmp_path, capsys):
    changed = [*ARGS, "train.learning_rate=1e-5", "train.betas=[0.5, 0.9]", "data.template_args={enable_thinking: no}"]
    assert main([*changed, "--print-config"]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(file) == load_config(None, changed) != load_config(None, ARGS)
