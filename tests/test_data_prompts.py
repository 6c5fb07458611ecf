"""Prompts out of rows: which messages are asked, what the row's own answer is, and what is refused."""

import json

import numpy as np
import pytest
from data_tools import GSM8K, ROOT, config, plain

from kdjax.config import SourceConfig
from kdjax.data import response_text
from kdjax.data.formats import RowError
from kdjax.data.prompts import Prompts
from kdjax.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def prompts(tmp_path, rows, source=None, **settings):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(file), **(source or {}))
    return Prompts([source], config(source, **settings), plain())


def rendered(*messages):
    """Ids as transformers renders and tokenizes them."""
    ids = plain().apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    return np.asarray(ids, np.int32)


def test_the_last_turn_of_the_assistant_is_the_answer(tmp_path):
    turns = [user("2 + 2?"), assistant("4"), user("and 3?"), assistant("7")]
    found = prompts(tmp_path, [{"messages": turns, "id": 5}, {"messages": turns[:3], "id": 6}])
    assert len(found) == 2
    for prompt, answer in zip(found, ("7", None), strict=True):
        assert prompt.messages == tuple(turns[:3]) and prompt.answer == answer and prompt.text == "and 3?"
        assert np.array_equal(prompt.ids, rendered(*turns[:3]))
        assert prompt.row["id"] in (5, 6)


@pytest.mark.parametrize("source", [{}, {"format": "prompt"}])
def test_rows_without_a_response(tmp_path, source):
    found = prompts(tmp_path, [{"prompt": "2 + 2?"}, {"prompt": [user("2?")]}], source, system="Count.")
    system = {"role": "system", "content": "Count."}
    assert [p.messages for p in found] == [(system, user("2 + 2?")), (system, user("2?"))]
    assert all(p.answer is None for p in found)
    assert np.array_equal(found[0].ids, rendered(system, user("2 + 2?")))


def test_the_teacher_may_read_another_prompt(tmp_path):
    rows = [{"prompt": "2 + 2?", "hint": "2 + 2? It is 4.", "response": "4"}]
    found = prompts(tmp_path, rows, {"teacher_input_key": "hint"})
    assert found[0].messages == (user("2 + 2?"),)
    assert np.array_equal(found[0].ids, rendered(user("2 + 2?"))) and found[0].text == "2 + 2?"
    assert np.array_equal(found[0].teacher_ids, rendered(user("2 + 2? It is 4.")))


def test_several_sources_in_order(tmp_path):
    sources = [
        SourceConfig(path=str(ROOT / "examples" / "data" / f"gsm8k_{name}.jsonl"), **GSM8K, max_samples=3)
        for name in ("test", "train")
    ]
    found = Prompts(sources, config(*sources), plain())
    assert [p.source.rpartition("/")[2] for p in found] == [
        *(f"gsm8k_test.jsonl:{i}" for i in (1, 2, 3)), *(f"gsm8k_train.jsonl:{i}" for i in (1, 2, 3))
    ]  # fmt: skip
    assert found[5].answer == found[5].row["answer"]
    with pytest.raises(IndexError):
        found[6]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [assistant("4")]}, "nothing to answer"),
        ({"messages": [{"role": "system", "content": "Count."}, assistant("4")]}, "nothing to answer"),
        ({"messages": [user("  \n")]}, "prompt is empty"),
        ({"messages": []}, "a list of messages"),
    ],
)
def test_a_row_with_nothing_to_answer(tmp_path, row, words):
    found = prompts(tmp_path, [{"messages": [user("fine")]}, row])
    with pytest.raises(RowError, match=words):
        found[1]
    assert found.where(1).endswith("rows.jsonl:2")


def test_plain_text_is_no_prompt(tmp_path):
    with pytest.raises(UserError, match="plain text has no prompts"):
        prompts(tmp_path, [{"text": "once upon a time"}])


def test_a_response_is_read_without_the_token_that_ended_it():
    said = np.asarray(plain().encode("7 , 8 .", add_special_tokens=False), np.int32)
    assert response_text(plain(), np.append(said, np.int32(2)), {2}) == response_text(plain(), said, {2}) == "7 , 8 ."
    assert response_text(plain(), said, {int(said[-1])}) == plain().decode(said[:-1])  # an end that is no special token
