"""Truth at the border: a head that is not the engine's stops the run before step 1 and says how large the gap is."""

import json
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_tools import TEMPLATES, config as data_config, family, plain, write_pairs
from local_engine import LocalEngine

from kdjax.config import LogConfig, from_dict
from kdjax.data import DataStream, Document
from kdjax.errors import UserError
from kdjax.models import load_model
from kdjax.sharding import make_mesh
from kdjax.training import preflight, templates
from kdjax.training.preflight import check_teacher
from kdjax.training.samples import answer_samples
from kdjax.training.sources import Stream

pytestmark = pytest.mark.usefixtures("devices_as_asked")


@pytest.fixture(scope="module")
def opened(request, tmp_path_factory):
    streams = []

    def make(values):
        if not streams:
            streams.append(Stream(from_dict(values), log=tmp_path_factory.mktemp("log") / "engine.log"))
        return streams[0]

    yield make
    for stream in streams:
        stream.close()


def other_heads():
    rng = np.random.default_rng(0)
    return {
        "a wrong head": lambda h: replace(h, weight=jnp.asarray(rng.normal(size=h.weight.shape), jnp.float32)),
        "a missing soft-cap": lambda h: replace(h, soft_cap=5.0),
        "a forgotten scale": lambda h: replace(h, scale=0.5),
        "a shuffled vocabulary": lambda h: replace(h, weight=h.weight[rng.permutation(len(h.weight))]),
        "a stale teacher": lambda h: replace(h, weight=h.weight * 1.01),
    }


def test_the_right_head_passes(run_values, opened):
    assert check_teacher(opened(run_values)) < 1e-4


@pytest.mark.parametrize("fault", list(other_heads()))
def test_another_head_is_refused(run_values, opened, fault):
    stream = opened(run_values)
    right = stream.teachers
    try:
        stream.teachers = (right[0]._replace(head=other_heads()[fault](right[0].head)),)
        with pytest.raises(UserError, match=r"preflight: .* differ from the engine's own by .* nats on average"):
            check_teacher(stream)
    finally:
        stream.teachers = right
    assert stream.engine.pool.usage().used == 0


@pytest.fixture
def exported(tiny_teacher, run_values, monkeypatch):
    """checks the tiny teacher's folder as if a model, a little changed, had been exported to it"""
    devices = []

    def start(folder, *, device, **options):
        devices.append(device)
        return LocalEngine(folder, **options)

    monkeypatch.setattr(preflight, "start_engine", start)
    model = load_model(tiny_teacher)
    right = model.embed.weight[...]

    def check(factor=1.0, **student):
        changed = from_dict(run_values | {"student": run_values["student"] | student})
        ids = [np.arange(start, start + 20, dtype=np.int32) for start in (5, 300)]
        documents = [Document(x, np.arange(20) > 0, "made") for x in ids]
        stream = SimpleNamespace(config=changed, mesh=make_mesh(devices=jax.devices()[:1]), tokenizer=None)
        stream.documents = lambda count: documents
        model.embed.weight[...] = right * factor
        checked = preflight.check_export(stream, model, tiny_teacher)
        assert devices.pop() == "cpu"  # the devices' memory belongs to JAX and to the engines
        return checked

    return check


def test_an_export_that_is_another_model_is_told_with_its_gap(exported):
    right, wrong = exported(), exported(1.001)
    assert right.gap < 1e-5 and right.fault is None
    assert 1e-4 < wrong.gap < 0.1
    for words in ("differ from the student's by", f"{wrong.gap:.3g} at most (allowed 0.0001", "checkpoints hold"):
        assert words in str(wrong.fault)


def test_bfloat16_has_room_to_round_and_no_more(exported):
    for student in ({"dtype": "bfloat16"}, {"export_dtype": "bfloat16"}):
        assert exported(1.001, **student).fault is None
        assert "allowed 0.03 and 0.3" in str(exported(1.5, **student).fault)
    same = {"param_dtype": "bfloat16", "export_dtype": "bfloat16"}  # nothing is rounded on the way
    assert exported(1.001, **same).fault is not None


def test_documents_are_looked_for_until_they_are_found(run_values, tmp_path):
    """good rows behind a hundred that are too long or malformed, and a source that has none at all"""
    bad = [json.dumps({"prompt": "How many?", "response": "four " * 400}), "{"] * 50
    good = [json.dumps({"prompt": f"{i}?", "response": "four"}) for i in range(9)]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("\n".join(bad + good) + "\n")
    second.write_text("\n".join(bad) + "\n")
    run_values["teacher"], run_values["data"]["tokenizer"] = {}, run_values["student"]["path"]
    run_values["data"] |= {"train": [{"path": str(first)}], "on_bad_row": "skip"}
    run_values["data"]["eval"] = [{"path": str(first)}, {"path": str(second)}]
    with Stream(from_dict(run_values)) as stream:
        found = stream.documents(4)
        assert [document.source for document in found] == [f"{first}:{number}" for number in range(101, 105)]
        assert len(stream.documents(4, held_out=True)) == 2  # the half of it that the first source stands for
    run_values["data"]["train"] = [{"path": str(second)}]
    with Stream(from_dict(run_values)) as stream, pytest.raises(UserError, match="no row to compare the models on"):
        preflight._sample(stream)


def told(ours, teacher, **settings):
    """What is said to a student of the family ``ours``; the teacher's tokenizer is None where nobody looks at it."""
    config = SimpleNamespace(data=data_config("rows.jsonl", **settings), teacher=SimpleNamespace(path="teacher"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "load_tokenizer", {"teacher": teacher}.__getitem__)
        return templates.compare_templates(family(ours), config)


def test_chat_templates_that_disagree_are_told():
    assert told("qwen2.5", family("qwen2.5")) == []
    notes = "\n".join(told("qwen2.5", family("llama3")))
    for words in ("<|im_end|>", "<|eot_id|>", "shows a question otherwise than the student's, from token 0"):
        assert words in notes
    bare = copy(family("qwen3"))
    bare.chat_template = None
    assert told("qwen2.5", bare) == ["warning: the teacher has no chat template of its own; it reads the student's"]
    given = {"chat_template": str(TEMPLATES / "gemma.jinja")}  # by the run, to a student that came without one
    assert told("gemma", family("gemma"), **given) == []
    (note,) = told("gemma", family("llama3"), **given)
    assert note.startswith("warning: the teacher's own chat template shows a question otherwise than the student's")
    with pytest.raises(UserError, match="data.chat_template: none.jinja cannot be read"):
        told("qwen2.5", None, chat_template="none.jinja")


def test_templates_that_differ_in_thinking_mode_alone_are_told():
    off = {"enable_thinking": False}
    assert told("qwen3", family("qwen3")) == told("qwen3", family("qwen3"), template_args=off) == []
    (note,) = told("qwen3", None, teacher_template_args=off)
    assert note.startswith("the teacher reads a question otherwise than the student, from token ")
    assert "(student: '', teacher: '<think>" in note and note.endswith("so they disagree about thinking mode")
    thinking = copy(family("qwen3"))
    thinking.chat_template = thinking.chat_template.replace("enable_thinking is false", "enable_thinking is none")
    (note,) = told("qwen3", thinking, template_args=off)
    assert note.startswith("warning: the teacher's own chat template shows a question otherwise than the student's")
    assert "(student: '<think>" in note and "so they disagree about thinking mode; it reads the student's form" in note
    (note,) = told("qwen2.5", None, teacher_template_args=off)
    assert "data.teacher_chat_template and teacher_template_args change nothing" in note


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_templates_are_compared_where_rows_go_through_one(train_on, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "compare_templates", lambda tokenizer, config: ["compared"])
    (tmp_path / "text.jsonl").write_text('{"text": "so it goes"}\n')
    for file, expected in ((write_pairs(tmp_path / "pairs.jsonl", 2), ["compared"]), (tmp_path / "text.jsonl", [])):
        data = DataStream(data_config(file, train_on=train_on), plain(), batch=1)
        assert templates.check_templates(SimpleNamespace(data=data, tokenizer=None, config=None)) == expected


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_turn_must_end_with_what_ends_a_response(train_on):
    tokenizer, config = family("qwen2.5"), SimpleNamespace(data=data_config("rows.jsonl", train_on=train_on))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert templates.check_end(tokenizer, config, {end}) == []
    with pytest.raises(
        UserError, match=rf"ends an assistant's turn with '<\|im_end\|>' .* rollout.stop_ids: \[{end}\]"
    ):
        templates.check_end(tokenizer, config, {end + 1})


def test_the_sample_question_goes_through_the_template_of_the_run():
    """a base model's tokenizer may have none of its own"""
    bare, asked = copy(family("gemma")), []
    bare.chat_template = None
    data = data_config("rows.jsonl", chat_template=str(TEMPLATES / "gemma.jinja"))
    config = SimpleNamespace(data=data, log=LogConfig(sample_prompt="2+3?", sample_tokens=4))

    def generate(prompts, sampling):
        asked.extend(prompts)
        return [SimpleNamespace(ids=[5]) for _ in prompts]

    answer_samples(SimpleNamespace(generate=generate), SimpleNamespace(config=config, tokenizer=bare))
    shown = "<bos><start_of_turn>user\n2+3?<end_of_turn>\n<start_of_turn>model\n"
    assert [bare.decode(ids) for ids in asked] == [shown]
