"""Bad input: one line that names fault and mend, exit code 2, and the output folder as it was before."""

import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_tools import Watcher, contents, go, without_teacher, write_config
from safetensors.numpy import save_file

from kdjax.config import from_dict, to_yaml
from kdjax.errors import UserError
from kdjax.train import main


def refused(values, capfd, *words, before=lambda output: None):
    """runs ``values`` (or a file), and checks what every fault has in common"""
    output = Path(values["output"])
    before(output)
    there, existed = contents(output), output.exists()
    assert_refused(capfd, ["--config", str(write_config(output.parent, values))], *words)
    assert contents(output) == there and output.exists() == existed


def assert_refused(capfd, argv, *words):
    capfd.readouterr()
    code = main(argv)
    error = capfd.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error


@pytest.fixture
def values(run_values):
    """a run on all of this machine's devices"""
    run_values["mesh"] = {"data": -1}
    run_values["train"]["batch_size"] = 8
    return run_values


@pytest.fixture
def sft(values):
    return without_teacher(values)


def changed(values, **groups):
    return values | {name: values.get(name, {}) | entries for name, entries in groups.items()}


# The configuration


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["run.yaml: no such configuration file"]),
        ("train: [1, 2", ["run.yaml:1: not valid YAML"]),
        ("- 1\n- 2\n", ["run.yaml: expected a mapping", "found list"]),
        ("train: {step: 5}\n", ["unknown key train.step; did you mean 'train.steps'?"]),
        ("trian: {steps: 5}\n", ["unknown key trian; did you mean 'train'?"]),
        ("train: {steps: many}\n", ["train.steps", "integer", "'many'"]),
        ("distill: {kd_ratio: 1.5}\n", ["distill.kd_ratio", "less than or equal to 1"]),
        ("train: {steps: 0}\n", ["train.steps", "greater than or equal to 1"]),
    ],
    ids=["missing", "broken", "no_mapping", "unknown_key", "unknown_group", "ill_typed", "out_of_range", "too_small"],
)
def test_configuration_files(tmp_path, monkeypatch, capfd, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("run.yaml").write_text(content)
    assert_refused(capfd, ["--config", "run.yaml", "student.path=s", "data.train=[{path: rows.jsonl}]"], *words)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"train": {"accumulate": 3}}, ["train.accumulate=3 does not divide train.batch_size=8"]),
        ({"train": {"keep_best": True, "eval_every": None}}, ["set train.eval_every"]),
        ({"student": {"init": "pretrained"}}, ["student.config changes shapes, so it needs student.init=random"]),
        ({"distill": {"loss": "klx"}}, ["distill.loss: no divergence 'klx'", "did you mean 'kl'?", "known:", "jsd"]),
        ({"distill": {"algorithm": "vanila"}}, ["distill.algorithm: no algorithm 'vanila'", "vanilla", "sft"]),
        ({"distill": {"loss": "nowhere.py:f"}}, ["nowhere.py is not a file"]),
        ({"distill": {"loss_args": {"beta": 1}}}, ["divergence 'kl' takes no beta; its parameters: temperature"]),
        ({"mesh": {"data": 3}}, ["mesh: data 3", "does not fit 8 device(s)"]),
        ({"mesh": {"data": -1, "fsdp": -1}}, ["only one of data, fsdp and tensor may be -1"]),
        ({"train": {"batch_size": 4}}, ["train.batch_size=4", "8 data shards", "make it a multiple"]),
        ({"data": {"max_len": 100_000}}, ["data.max_len=100000 is beyond the student's", "lower it"]),
        ({"teacher": {"quantization": "fp8"}}, ["teacher.quantization=fp8", "set teacher.engine=sglang"]),
    ],
    ids=lambda value: "-".join(f"{k}.{next(iter(v))}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_values_that_cannot_work(values, capfd, monkeypatch, groups, words):
    for loader in ("training.student.load_model", "training.teacher.started", "rollouts.engines.started"):
        monkeypatch.setattr(f"kdjax.{loader}", lambda *_, **__: pytest.fail("something was loaded"))
    refused(changed(values, **groups), capfd, *words)


def test_the_teachers_positions_are_known_before_its_weights_are_read(values, tmp_path, capfd):
    shape = json.loads((Path(values["teacher"]["path"]) / "config.json").read_text())
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 128}))
    words = "data.max_len=256 is beyond the teacher's 128 positions; lower it"
    refused(changed(values, teacher={"path": str(tmp_path / "teacher")}), capfd, words)


def test_an_engine_that_takes_less_than_the_teachers_positions_says_so_as_it_starts(values, local_engines, monkeypatch):
    """SGLang keeps some of them: without this the first document that is cut to max_len would end the run"""
    from local_engine import LocalEngine

    monkeypatch.setattr(LocalEngine, "wait_ready", lambda self: setattr(self, "max_tokens", 250))
    with pytest.raises(UserError, match="data.max_len=256 is beyond the 250 tokens that the teacher's engine takes"):
        go(values)


# The data


def rows_file(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"path": str(file), "format": "prompt_response"}


PAIR = json.dumps({"prompt": "How many?", "response": "four"}) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, ["none.jsonl: no such file"]),
        ("empty.jsonl", "", ["empty.jsonl: the file is empty"]),
        ("blank.jsonl", "\n\n", ["blank.jsonl: the dataset has no rows"]),
        ("list.json", "[]", ["list.json: the dataset has no rows"]),
        ("junk.jsonl", bytes(range(128, 256)) * 40, ["junk.jsonl:1: not"]),
        ("junk.csv", bytes(range(128, 256)) * 40, ["junk.csv: not a CSV file"]),
        ("junk.parquet", bytes(range(256)) * 40, ["junk.parquet: not a readable parquet file"]),
        ("junk.bin", bytes(range(256)), ["unknown kind of file '.bin'", ".jsonl"]),
        ("first.jsonl", '{"question": "a", "response": "b"}\n', ["no column 'prompt'", "name the right one"]),
        ("later.jsonl", PAIR * 3 + '{"prompt": "a"}\n' + PAIR, ["later.jsonl:4: no column 'response'", "on_bad_row"]),
        ("cut.jsonl", PAIR * 3 + PAIR[:20], ["cut.jsonl:4: not JSON", "mend the row, or set data.on_bad_row: skip"]),
        ("long.jsonl", PAIR.replace("four", "four " * 400), ["none of the 1 rows", "longer than data.max_len=256"]),
    ],
    ids=lambda value: value if isinstance(value, str) and value.count(".") == 1 and len(value) < 20 else "",
)
@pytest.mark.parametrize("which", ["train", "eval"])
def test_data(sft, tmp_path, capfd, which, name, content, words):
    source = rows_file(tmp_path, name, content) if content is not None else {"path": str(tmp_path / name)}
    refused(changed(sft, data={which: [source]}), capfd, *words)


def test_the_teacher_does_not_start_for_a_missing_file(values, tmp_path, capfd):
    source = {"path": str(tmp_path / "none.jsonl")}
    refused(changed(values, data={"train": [source]}, teacher={"path": str(tmp_path)}), capfd, "none.jsonl: no such")


def test_packing_for_a_kernel_without_segments_is_warned_of_before_anything_loads(sft, tmp_path):
    for packing in (True, False):
        student = {"attention": "cudnn", "dtype": "bfloat16"}
        data = {"packing": packing, "train": [{"path": str(tmp_path / "none.jsonl")}]}
        display = Watcher()
        with pytest.raises(UserError, match="no such"):
            go(changed(sft, student=student, data=data), display)
        assert [line for line in display.lines if "data.packing=false" in line] == display.lines
        assert len(display.lines) == packing


# Models and tokenizers


@pytest.fixture
def copied(tiny_teacher, tmp_path):
    """the teacher's folder, to be broken"""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "broken"))


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_tokenizer_without_chat_template(sft, copied, capfd):
    (copied / "chat_template.jinja").unlink()
    edit_json(copied / "tokenizer_config.json", lambda c: c.pop("chat_template", None))
    refused(changed(sft, data={"tokenizer": str(copied)}), capfd, "no chat template", "set data.chat_template")


def test_vocabularies_that_differ(values, copied, capfd):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[300:302]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit_json(copied / "tokenizer.json", swap)
    refused(
        changed(values, data={"tokenizer": str(copied)}),
        capfd,
        "the vocabularies differ",
        "use a teacher with the student's tokenizer",
    )


def test_head_width_that_does_not_fit(values, copied, capfd):
    edit_json(copied / "config.json", lambda c: c.update(hidden_size=64))
    refused(changed(values, teacher={"path": str(copied)}), capfd, "(4096, 48)", "config.json says (4096, 64)")


def test_weights_that_do_not_fit_their_configuration(sft, copied, capfd):
    edit_json(copied / "config.json", lambda c: c.update(intermediate_size=64))
    student = {"path": str(copied), "init": "pretrained", "config": {}}
    refused(sft | {"student": student}, capfd, "tensors do not fit", "misshaped", "mlp.up_proj.weight")


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_truncated_safetensors(values, copied, capfd, whose):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    student = {"path": str(copied), "init": "pretrained"}
    broken = values | {"student": student} if whose == "student" else changed(values, teacher={"path": str(copied)})
    refused(broken, capfd, "model.safetensors: damaged or cut-off safetensors file", "fetch it again")


@pytest.mark.parametrize("left", [-100, 30, 4, 0], ids=["data", "header", "length", "nothing"])
def test_a_truncated_file_that_the_teachers_head_is_not_in(values, copied, capfd, left):
    """a whole model's other files too: SGLang would only say that it did not start"""
    file = copied / "model-00002-of-00002.safetensors"
    save_file({"a": np.zeros((8, 8), np.float32)}, file)
    file.write_bytes(file.read_bytes()[:left])
    broken = changed(values, teacher={"path": str(copied)})
    refused(broken, capfd, f"{file.name}: damaged or cut-off safetensors file", "fetch it again")


def test_unsupported_architecture(sft, copied, capfd):
    edit_json(copied / "config.json", lambda c: c.update(model_type="mamba"))
    refused(sft | {"student": {"path": str(copied)}}, capfd, "'mamba' is not supported; known are llama, qwen2, qwen3")


def test_folders_that_are_nowhere(values, tmp_path, capfd):
    nowhere = str(tmp_path / "nowhere")
    refused(changed(values, student={"path": nowhere}), capfd, "nowhere is neither a folder nor a hub id")
    refused(changed(values, teacher={"path": nowhere}), capfd, "nowhere is neither a folder nor a hub id")


# The output folder


def earlier_run(values, output, **groups):
    """what a run with other values left"""
    (output / "checkpoints" / "4").mkdir(parents=True)
    (output / "config.yaml").write_text(to_yaml(from_dict(changed(values, **groups))))


def test_checkpoint_of_another_configuration(sft, capfd):
    refused(
        sft,
        capfd,
        "another configuration (differs in data.max_len, train.learning_rate)",
        "choose another output, or start anew with overwrite=true",
        before=lambda output: earlier_run(sft, output, train={"learning_rate": 1e-3}, data={"max_len": 128}),
    )


def test_finished_output_folder(sft, capfd):
    def finished(output):
        earlier_run(sft, output)
        (output / "export").mkdir()
        (output / "result.json").write_text("{}")

    refused(sft, capfd, "holds this run, finished", "overwrite=true", before=finished)


def test_output_folders_that_cannot_be_used(sft, capfd):
    def damaged(output):
        earlier_run(sft, output)
        (output / "config.yaml").write_text("train: [")

    refused(sft, capfd, "config.yaml: damaged", "choose another output", before=damaged)
    no_resume = changed(sft, checkpoint={"resume": False})
    refused(no_resume, capfd, "checkpoint.resume is false; choose another output, or overwrite=true")
    shutil.rmtree(sft["output"])
    Path(sft["output"]).write_text("a file")
    refused(sft, capfd, "cannot be written", "choose another")


def test_a_folder_in_use(sft, capfd):
    output = Path(sft["output"])
    output.mkdir()
    with (output / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(sft, capfd, "another run writes there; wait for it, or choose another output")


def test_a_bad_start_does_not_cost_the_run_that_it_would_overwrite(sft, tmp_path, capfd):
    """overwrite=true deletes the earlier run only once the new one trains"""
    bad = changed(sft, data={"train": [rows_file(tmp_path, "later.jsonl", PAIR * 3 + '{"prompt": "a"}\n')]})
    refused(
        bad | {"overwrite": True},
        capfd,
        "later.jsonl:4: no column 'response'",
        before=lambda output: earlier_run(sft, output, train={"learning_rate": 1e-3}),
    )
    assert yaml.safe_load((Path(sft["output"]) / "config.yaml").read_text())["train"]["learning_rate"] == 1e-3
