"""Written answers: filters and counts by hand, data that trains, and nothing lost or doubled however a run ends."""

import json
import signal
from io import StringIO
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from data_tools import ROOT
from rich.console import Console

import kdjax.generation.answers
from bridge.engine import Completion
from bridge.errors import EngineError, PromptError
from kdjax.config import from_dict
from kdjax.data import DataStream, load_tokenizer
from kdjax.errors import UserError
from kdjax.generate import generate
from kdjax.generation.journal import Journal
from kdjax.generation.tasks import evaluate_task
from kdjax.progress import Display

TOKENIZER = ROOT / "examples" / "arithmetic" / "tokenizer"
END = 2


class Scripted:
    """Stands in for an engine: ``answer(prompt text, sample number)`` gives a text, unfinished where it ends in …"""

    def __init__(self, answer):
        self.answer, self.tokenizer = answer, load_tokenizer(TOKENIZER)
        self.asked, self.started, self.restarted, self.faults = [], 0, 0, []
        self.spec, self.sampling, self.pid, self.log = None, None, 1, "engine.log"

    def start(self, model, key, **spec):
        self.started, self.spec = self.started + 1, SimpleNamespace(model=model, **spec)
        return self

    def wait_ready(self):
        pass

    def restart(self):
        self.restarted, self.pid = self.restarted + 1, 1

    def generate(self, prompts, sampling):
        self.sampling = sampling
        if self.faults and (fault := self.faults.pop(0)):
            self.pid = None if fault == "dies" else 1
            raise EngineError(f"engine {fault}\nlog")
        made = []
        for ids in prompts:
            text = self.tokenizer.decode(ids[1:-2])  # <|user|> … <|end|><|assistant|>
            self.asked.append(text)
            for number in range(sampling.n):
                said = self.answer(text, number)
                ends = [] if said.endswith("…") else [END]
                out = [*self.tokenizer.encode(said.removesuffix("…")), *ends]
                reason = "stop" if ends else "length"
                made.append(Completion(np.array(out, np.int32), np.zeros(len(out), np.float32), reason, 0))
        return made

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def scripted(monkeypatch):
    def use(answer):
        engine = Scripted(answer)
        monkeypatch.setattr(kdjax.generation.answers, "started", engine.start)
        return engine

    return use


@pytest.fixture
def model(tmp_path):
    """A folder that has all but weights; a scripted engine needs none."""
    folder = tmp_path / "model"
    load_tokenizer(TOKENIZER).save_pretrained(folder)
    shape = {"hidden_size": 8, "vocab_size": 104, "eos_token_id": END, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@pytest.fixture
def values(tmp_path, model):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1", "response": f"#### {i + 1}"}) + "\n" for i in range(7)))
    return {
        "output": str(tmp_path / "run"),
        "teacher": {"path": str(model)},
        "data": {"train": [{"path": str(rows)}], "eval": [{"path": str(rows)}]},
        "generate": {"batch_size": 2, "max_new_tokens": 32},
    }


def go(values, **settings):
    values = values | {"generate": values["generate"] | settings}
    return generate(from_dict(values), Display(quiet=True))


def rows_of(values, name="generated.jsonl"):
    path = f"{values['output']}/{name}"
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def right(prompt, number):
    return f"#### {int(prompt.split('+')[0]) + 1}"


def test_rows_that_train(values, scripted):
    engine = scripted(lambda prompt, number: f"{prompt} is {number}")
    report = go(values, samples=2)
    rows = rows_of(values)
    assert len(rows) == report["kept"] == report["answers"] == 14 and report["prompts"] == 7
    assert rows[5]["messages"] == [{"role": "user", "content": "2+1"}, {"role": "assistant", "content": "2+1 is 1"}]
    assert rows[5]["source"].endswith("rows.jsonl:3") and rows[5]["answer"] == "#### 3"
    assert rows[5]["tokens"] == len("2+1 is 1") + 1 and report["kept_tokens"] == 14 * 9
    assert engine.sampling.banned_ids == (102, 103) and engine.spec.call_timeout == 1800
    data = from_dict(
        values | {"data": {"train": [{"path": f"{values['output']}/generated.jsonl"}], "max_len": 32}}
    ).data
    host = next(stream := DataStream(data, load_tokenizer(TOKENIZER), batch=8, epochs=1))
    stream.close()
    document = min((placed.document for placed in host.documents), key=lambda d: d.source)
    tokenizer = load_tokenizer(TOKENIZER)
    assert tokenizer.decode(document.ids) == "<|user|>0+1<|end|><|assistant|>0+1 is 0<|end|>"
    assert tokenizer.decode(document.ids[document.loss]) == "0+1 is 0<|end|>"


def test_neither_jax_nor_sleep_is_asked_for(values, scripted, monkeypatch):
    def started(*_):
        raise AssertionError("a backend of JAX is started")

    monkeypatch.setattr(jax, "default_backend", started)
    monkeypatch.setattr(jax, "devices", started)
    monkeypatch.setattr(kdjax.generation.answers, "engine_device", lambda: "cuda")
    engine = scripted(right)
    go(values | {"colocate": True}, seed=5)
    spec = engine.spec
    assert (spec.device, spec.dtype, spec.seed, spec.mem_fraction) == ("cuda", "bfloat16", 5, 0.4)
    assert "enable_memory_saver" not in spec.options and spec.options["tp_size"] == 1


def test_a_terminal_shows_a_bar_with_rates_in_place_of_lines(values, scripted):
    scripted(right)
    display = Display()
    display.console = Console(file=StringIO(), force_terminal=True, highlight=False, width=120)
    generate(from_dict(values), display)
    shown = display.console.file.getvalue()
    assert "7/7" in shown and "answers/s  ended 100%" in shown and "━" in shown
    assert "7/7 prompts" not in shown and "7 of 7 answers to 7 prompts kept" in shown


def test_filters_count_what_they_drop(values, scripted):
    said = {
        "0+1": ["#### 1", "#### 1", "1 #### 1"],  # the second is a duplicate
        "1+1": ["#### 3", "#### 2…", "  "],  # wrong, unfinished, empty
        "2+1": ["####3", "2+1=3 #### 3", "2+1=3 so it is #### 3"],  # short, kept, long
    }
    scripted(lambda prompt, number: said.get(prompt, ["#### 0"] * 3)[number])
    report = go(values, samples=3, judge="gsm8k", min_tokens=7, max_tokens=16)
    dropped = {"duplicate": 1, "rejected": 1 + 4 * 3, "unfinished": 1, "empty": 1, "short": 1, "long": 1}
    assert report["dropped"] == dropped and report["kept"] == 3 and report["prompts_with_a_kept_answer"] == 2
    assert [row["messages"][1]["content"] for row in rows_of(values)] == ["#### 1", "1 #### 1", "2+1=3 #### 3"]
    assert {row["reward"] for row in rows_of(values)} == {1.0}


def test_filters_may_change_afterwards(values, scripted):
    engine = scripted(lambda prompt, number: right(prompt, number) if prompt < "3" else "####…")
    assert go(values)["kept"] == 3
    assert go(values, keep_unfinished=True)["kept"] == 7
    assert engine.started == 1
    with pytest.raises(UserError, match="no answer was kept: 3 answers shorter .*, 4 answers cut at"):
        go(values, min_tokens=9)
    assert len(rows_of(values)) == 7  # what was there stays


def test_every_cut_of_the_journal_is_healed(values, scripted, tmp_path):
    """Killed at any byte: the same file in the end, and no prompt asked that a whole line answers."""
    engine = scripted(right)
    go(values)
    whole, journal = rows_of(values), tmp_path / "run" / "generated.journal.jsonl"
    content = journal.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 5  # settings, then two prompts a batch
    for cut in sorted({0, 1, 5, *range(20, len(content), 53), *ends, *(end - 1 for end in ends)}):
        journal.write_bytes(content[:cut])
        (tmp_path / "run" / "generated.jsonl").unlink()
        engine.asked.clear()
        go(values)
        answered = sum(end <= cut for end in ends[1:])
        assert engine.asked == [f"{i}+1" for i in range(2 * answered, 7)]
        assert rows_of(values) == whole and journal.read_bytes() == content


def test_a_dead_engine_is_started_again(values, scripted):
    engine = scripted(right)
    engine.faults = [None, "dies", "dies", None]
    assert go(values)["kept"] == 7
    assert engine.restarted == 2 and engine.asked == [f"{i}+1" for i in range(7)]


def test_an_engine_that_lives_and_refuses_is_not_started_again(values, scripted):
    engine = scripted(right)
    engine.faults = ["refuses"]
    with pytest.raises(EngineError, match="refuses"):
        go(values)
    assert engine.restarted == 0


def test_an_engine_that_keeps_dying_ends_the_run_and_loses_nothing(values, scripted):
    engine = scripted(right)
    engine.faults = [None, *3 * ["dies"]]
    values["teacher"]["restarts"] = 2
    with pytest.raises(EngineError, match="started again 2 times; teacher.restarts"):
        go(values)
    engine.asked.clear()
    assert go(values)["kept"] == 7
    assert engine.asked == [f"{i}+1" for i in range(2, 7)]


def test_a_signal_stops_behind_the_batch_in_hand(values, scripted):
    def answer(prompt, number):
        if prompt == "2+1" and not engine.started > 1:
            signal.raise_signal(signal.SIGTERM)
        return right(prompt, number)

    engine = scripted(answer)
    with pytest.raises(UserError, match="SIGTERM: 4 of 7 prompts are answered; run the same command"):
        go(values)
    assert go(values)["kept"] == 7
    assert engine.asked == [f"{i}+1" for i in range(7)]


def test_a_signal_while_the_engine_starts(values, scripted, monkeypatch):
    scripted(right)
    monkeypatch.setattr(Scripted, "wait_ready", lambda self: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(UserError, match="SIGTERM: 0 of 7 prompts are answered; run the same command"):
        go(values)


def test_other_settings_are_refused(values, scripted, tmp_path):
    engine = scripted(right)
    go(values)
    changes = {"temperature": (1.0, 0.5), "seed": (0, 7), "top_k": (0, 3), "samples": (1, 2), "batch_size": (2, 3)}
    for key, (old, new) in changes.items():
        with pytest.raises(UserError, match=rf"another generate.{key} \({old}, now {new}\); .*overwrite=true"):
            go(values, **{key: new})
    values["data"]["train"][0]["max_samples"] = 7
    with pytest.raises(UserError, match=r"another source 0: max_samples \(null, now 7\)"):
        go(values)
    values["data"]["train"][0].pop("max_samples")
    (tmp_path / "model" / "config.json").write_text((tmp_path / "model" / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match="another model"):
        go(values)
    values["overwrite"] = True
    assert go(values, temperature=0.5)["kept"] == 7
    assert engine.started == 2


def test_prompts_that_changed_are_refused(values, scripted, tmp_path):
    scripted(right)
    go(values)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("4+1", "9+1"))
    with pytest.raises(UserError, match="the prompts from .*rows.jsonl:5 on have changed"):
        go(values)


def test_a_file_of_someone_elses_is_left_alone(values, scripted, tmp_path):
    scripted(right)
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not written by this command"):
        go(values, out=str(tmp_path / "mine.jsonl"))
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"


def test_prompts_that_cannot_be_asked(values, scripted, tmp_path):
    engine = scripted(right)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + '{"prompt": "", "response": "1"}\n{"prompt": "123456+1", "response": "1"}\n')
    with pytest.raises(UserError, match="rows.jsonl:8: the prompt is empty; mend the row, or set data.on_bad_row"):
        go(values, prompt_max_len=8)
    values["data"]["on_bad_row"] = "skip"
    report = go(values, prompt_max_len=8)
    assert report["left_out"] == {"bad": 1, "long": 1} and report["kept"] == 7 and report["prompts"] == 9
    assert engine.asked == [f"{i}+1" for i in range(7)]
    with pytest.raises(UserError, match="leaves no room for a prompt in the 64 positions"):
        go(values, max_new_tokens=60)


def test_accuracy_and_its_standard_error(values, scripted):
    engine = scripted(lambda prompt, number: right(prompt, number) if (prompt < "3") or number else "#### 0")
    config = from_dict(values)
    found = evaluate_task(config, values["teacher"]["path"], "gsm8k", display=Display(quiet=True))
    assert found["accuracy"] == pytest.approx(3 / 7) and found["prompts"] == 7
    assert found["standard_error"] == pytest.approx((3 / 7 * 4 / 7 / 6) ** 0.5)
    rows = rows_of(values, "answers/gsm8k-model.jsonl")
    assert [row["reward"] for row in rows] == [1, 1, 1, 0, 0, 0, 0]
    assert rows[3]["prompt"] == "3+1" and rows[3]["response"] == "#### 0" and rows[3]["answer"] == "#### 4"
    assert evaluate_task(config, values["teacher"]["path"], "gsm8k", display=Display(quiet=True)) == found
    assert engine.started == 1
    # Two answers a prompt: a prompt counts with their mean. Other settings replace the answers.
    values["generate"]["samples"] = 2
    found = evaluate_task(from_dict(values), values["teacher"]["path"], "gsm8k", display=Display(quiet=True))
    each = [1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    assert found["accuracy"] == pytest.approx(np.mean(each)) and found["answers"] == 14
    assert found["standard_error"] == pytest.approx(np.std(each, ddof=1) / 7**0.5)
    assert engine.started == 2


def test_a_task_that_asks_nothing_leaves_earlier_answers_alone(values, scripted):
    scripted(right)
    evaluate_task(from_dict(values), values["teacher"]["path"], "gsm8k", display=Display(quiet=True))
    before = rows_of(values, "answers/gsm8k-model.jsonl")
    values["generate"]["prompt_max_len"] = 1
    with pytest.raises(UserError, match=r"task gsm8k: no prompt could be asked \({'long': 7}\)"):
        evaluate_task(from_dict(values), values["teacher"]["path"], "gsm8k", display=Display(quiet=True))
    assert rows_of(values, "answers/gsm8k-model.jsonl") == before


@pytest.mark.parametrize(("path", "whose"), [(None, "teacher"), ("other", "model")])
def test_what_the_engine_refuses_names_whose_it_is(values, scripted, path, whose):
    def refuse(prompt, number):
        raise PromptError("a prompt of 9 tokens")

    scripted(refuse)
    model, values["teacher"]["path"] = values["teacher"]["path"], path or values["teacher"]["path"]
    with pytest.raises(UserError, match=rf"^{whose} {model}: a prompt of 9 tokens; see generate.prompt_max_len"):
        evaluate_task(from_dict(values), model, "gsm8k", display=Display(quiet=True))


def test_a_task_of_ones_own(values, scripted, tmp_path):
    engine = scripted(right)
    mine = tmp_path / "mine.py"
    mine.write_text("def length(prompt, response, row):\n    return len(response) / 4\n")
    config = from_dict(values)
    found = evaluate_task(config, values["teacher"]["path"], f"{mine}:length", display=Display(quiet=True))
    assert found["reward"] == 1.5 and found["standard_error"] == 0 and "accuracy" not in found
    mine.write_text("def length(prompt, response, row):\n    return len(response)\n")
    evaluate_task(config, values["teacher"]["path"], f"{mine}:length", display=Display(quiet=True))
    assert engine.started == 2  # another function is another task
    with pytest.raises(UserError, match="no reward 'gsm9k'"):
        evaluate_task(config, values["teacher"]["path"], "gsm9k")


def test_the_teacher_writes_with_its_own_prompt_and_every_model_is_scored_on_the_plain_one(values, scripted, tmp_path):
    """rewards see the row's last message in both, as they do of rollouts: tests/test_rollout_batches.py"""
    rows = [{"prompt": f"{i}+1", "hint": f"it is {i + 1}", "response": f"#### {i + 1}"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def seen(prompt, response, row):\n    return prompt == row['prompt']\n")
    for side in ("train", "eval"):
        values["data"][side][0]["teacher_prompt"] = "{prompt} {hint}"
    engine = scripted(lambda prompt, number: "#### 1")
    go(values, judge=f"{tmp_path}/mine.py:seen", min_reward=1.0)
    assert engine.asked == ["0+1 it is 1", "1+1 it is 2"]
    assert [row["messages"][0]["content"] for row in rows_of(values)] == ["0+1", "1+1"]
    engine.asked.clear()
    task = f"{tmp_path}/mine.py:seen"
    found = evaluate_task(from_dict(values), values["teacher"]["path"], task, display=Display(quiet=True))
    assert engine.asked == ["0+1", "1+1"] and found["accuracy"] == 1.0


def test_a_journal_is_locked_and_knows_its_own(tmp_path):
    path = tmp_path / "a.journal.jsonl"
    journal = Journal(path, {"a": 1})
    with pytest.raises(UserError, match="another process writes there"):
        Journal(path, {"a": 1})
    journal.append({"n": 1})
    journal.append({"n": 2})
    journal.close()
    path.write_bytes(path.read_bytes().replace(b'{"n": 1}', b'{"n": 1'))
    with pytest.raises(UserError, match="a.journal.jsonl:2: not a line of a journal"):
        Journal(path, {"a": 1})
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes")
    for fresh in (False, True):
        with pytest.raises(UserError, match="not a journal of answers"):
            Journal(notes, {"a": 1}, fresh=fresh)
    assert notes.read_text() == "my notes"
