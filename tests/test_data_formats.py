"""every kind of file and every form of row gives the same training tokens; bad input gives one clear line."""

import csv
import json

import pytest
from data_tools import GSM8K, config, plain, write_pairs

from kdjax.config import SourceConfig
from kdjax.data import DataStream
from kdjax.data.files import open_rows
from kdjax.data.formats import RowError, choose_reader
from kdjax.errors import UserError

QUESTION, ANSWER = "2+3?", "5"
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
PAIR = {"prompt": QUESTION, "response": ANSWER}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stream(source, **settings):
    return DataStream(config(source, **settings), plain(), batch=1, epochs=1, seed=0)


def texts(source, **settings):
    """Decoded documents with the text that carries loss, in file order."""
    made = stream(source, **{"shuffle": False, "packing": False, **settings})
    documents = [p.document for host in made for p in host.documents]
    made.close()
    return [(plain().decode(d.ids.tolist()), plain().decode(d.ids[d.loss].tolist())) for d in documents]


EXPECTED = [("<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n", "5<|im_end|>")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        {"messages": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        {"instruction": QUESTION, "input": "", "output": ANSWER},
        PAIR,
        {"prompt": CHAT[:1], "response": CHAT[1:]},
        {"messages": [{**message, "name": None} for message in CHAT]},
    ],
    ids=["chat", "sharegpt", "sharegpt-in-messages", "alpaca", "pair", "pair-of-messages", "null-keys"],
)
def test_each_form_is_found_by_its_columns(tmp_path, row):
    assert texts(jsonl(tmp_path / "rows.jsonl", [row])) == EXPECTED


def test_forms_in_full(tmp_path):
    alpaca = {"instruction": "Add.", "input": QUESTION, "output": ANSWER, "system": "Be brief."}
    alpaca["history"] = [["a", "b"]]
    (found,) = texts(jsonl(tmp_path / "alpaca.jsonl", [alpaca]))
    assert found == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nAdd.\n\n2+3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n",
        "b<|im_end|>5<|im_end|>",
    )
    (text,) = texts(jsonl(tmp_path / "text.jsonl", [{"text": "Two and two."}]))
    first = plain().decode(plain()("Two and two.")["input_ids"][:1])
    assert text == ("Two and two.", "Two and two.".removeprefix(first))


def test_named_columns_and_a_system_message(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"question": QUESTION, "answer": ANSWER, "messages": "unused"}])
    source = SourceConfig(path=str(path), format="prompt_response", **GSM8K)
    assert texts(source) == EXPECTED
    system = "<|im_start|>system\nCount.<|im_end|>\n"
    assert texts(source, system="Count.") == [(system + EXPECTED[0][0], "5<|im_end|>")]
    chat = {"messages": [{"role": "system", "content": "Mine."}, *CHAT]}
    (found,) = texts(jsonl(tmp_path / "own.jsonl", [chat]), system="Count.")
    assert "Mine." in found[0] and "Count." not in found[0]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "saved", "saved-splits"])
def test_each_kind_of_file(tmp_path, kind):
    datasets = pytest.importorskip("datasets") if kind in ("parquet", "arrow", "saved", "saved-splits") else None
    rows = [PAIR, {"prompt": 'quote "a", b\nand é', "response": "yes\n"}]
    path, split = tmp_path / f"rows.{kind}", None
    if kind == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, rows)).encode())  # BOM, CRLF, blank lines
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "arrow":
        folder = tmp_path / "folder"
        datasets.Dataset.from_list(rows).save_to_disk(str(folder))
        path = next(folder.glob("*.arrow"))
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        parts = {"train": datasets.Dataset.from_list(rows[:1]), "held": datasets.Dataset.from_list(rows)}
        datasets.DatasetDict(parts).save_to_disk(str(path))
        assert texts(str(path)) == EXPECTED  # train is what one means
        split = "held"
    found = texts(SourceConfig(path=str(path), split=split))
    assert found[0] == EXPECTED[0]
    assert found[1][1] == "yes\n<|im_end|>" and 'quote "a", b\nand é' in found[1][0]


def test_hub_ids_go_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([PAIR])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, subset: ["test", "train"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts("someone/rows:main") == EXPECTED
    assert texts(SourceConfig(path="someone/rows", split="test[:1]")) == EXPECTED
    assert asked == [("someone/rows", "main", "train"), ("someone/rows", None, "test")]
    with pytest.raises(UserError, match="no split 'dev'; it has test, train"):
        open_rows("someone/rows", "dev")


@pytest.mark.parametrize(
    ("split", "rows"),
    [("[:3]", [0, 1, 2]), ("[8:]", [8, 9]), ("[90%:]", [9]), ("[20%:4]", [2, 3]), ("[:]", list(range(10)))],
)
def test_ranges_of_rows(tmp_path, split, rows):
    opened = open_rows(str(write_pairs(tmp_path / "rows.jsonl", 10)), split)
    assert [row["prompt"] for row in (opened[i] for i in range(len(opened)))] == [f"say {i}" for i in rows]
    assert opened.where(0).endswith(f"rows.jsonl:{rows[0] + 1}")


def test_max_samples_takes_the_first_rows(tmp_path):
    path = write_pairs(tmp_path / "rows.jsonl", 10)
    assert len(texts(SourceConfig(path=str(path), max_samples=3))) == 3


BAD_FILES = [
    ("missing.jsonl", None, "missing.jsonl: no such file"),
    ("empty.jsonl", b"", "empty.jsonl: the file is empty"),
    ("blank.jsonl", b"\n\n\n", "blank.jsonl: the dataset has no rows"),
    ("nothing.json", b"[]", "nothing.json: the dataset has no rows"),
    ("header.csv", b"prompt,response\n", "header.csv: the dataset has no rows"),
    ("junk.jsonl", bytes(range(128, 256)) * 9, "junk.jsonl:1: not (text|JSON)"),
    ("junk.json", bytes(range(128, 256)) * 9, "junk.json:?1?: not (text|JSON)"),
    ("junk.csv", bytes(range(128, 256)) * 9, "junk.csv: not a CSV file"),
    ("junk.parquet", bytes(range(256)) * 9, "junk.parquet: not a readable parquet file"),
    ("junk.arrow", bytes(range(256)) * 9, "junk.arrow: not a readable arrow file"),
    ("object.json", b'{"prompt": "a"}', "object.json: expected a list of rows, found dict"),
    ("broken.json", b'[{"prompt":\n "a",]', "broken.json:2: not JSON"),
    ("rows.txt", b"hello", "unknown kind of file '.txt'; known are .jsonl, .json"),
    ("truncated.jsonl", b'{"prompt": "a", "resp', "truncated.jsonl:1: not JSON"),
    ("list.jsonl", b"[1, 2]\n", "list.jsonl:1: expected an object of columns, found list"),
    ("other.jsonl", b'{"q": "a", "a": "b"}\n', r"no known row format among the columns \(q, a\)"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        stream(path)
    assert "\n" not in str(raised.value) and name in str(raised.value)


def test_folders_that_are_no_dataset(tmp_path):
    with pytest.raises(UserError, match="not a saved dataset folder"):
        stream(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="the saved dataset cannot be read"):
        stream(tmp_path)
    with pytest.raises(UserError, match="no such file, folder or hub dataset"):
        stream(tmp_path / "none" / "such" / "folder")


def test_a_hub_id_without_a_hub(monkeypatch):
    with pytest.raises(UserError, match="nobody/nothing: neither a file or folder here nor a dataset on the hub"):
        stream("nobody/nothing")


def test_splits_that_cannot_be(tmp_path):
    path = str(write_pairs(tmp_path / "rows.jsonl", 4))
    with pytest.raises(UserError, match="a single file has no split 'train'"):
        open_rows(path, "train")
    with pytest.raises(UserError, match="is not a name with an optional range"):
        open_rows(path, "[1:2:3]")
    with pytest.raises(UserError, match="the dataset has no rows"):
        open_rows(path, "[4:]")


def test_a_column_that_is_not_there_lists_the_columns(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    source = SourceConfig(path=str(path), format="prompt_response", prompt_key="question")
    with pytest.raises(UserError, match="no column 'response'.*the columns are question, answer"):
        stream(source)
    hinted = SourceConfig(path=str(path), **GSM8K, teacher_input_key="hint")
    with pytest.raises(UserError, match="no column 'hint'"):
        stream(hinted)


BAD_ROWS = [
    ({"prompt": "a"}, "no column 'response'; the columns are prompt"),
    ({"prompt": None, "response": "b"}, "column 'prompt' is empty"),
    ({"prompt": 3, "response": "b"}, "column 'prompt' holds a number, expected text or a list of messages"),
    ({"prompt": [], "response": "b"}, "column 'prompt' holds an empty list"),
    ({"prompt": "a", "response": [{"content": "b"}]}, "column 'response': message 0 has neither role nor from"),
    ({"prompt": "a", "response": ["b"]}, "column 'response': message 0 is text, expected {role, content}"),
    ({"prompt": "a", "response": [{"role": "assistant"}]}, "column 'response': message 0 has nothing for content"),
    (
        {"prompt": [{"from": "one", "value": "a"}], "response": "b"},
        "column 'prompt': message 0 is from 'one', known are",
    ),
    ({"prompt": [{"role": 1, "content": "a"}], "response": "b"}, "column 'prompt': message 0 has a number for a role"),
    ({"prompt": "a", "response": "b", "tools": "t"}, "column 'tools' holds text"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows_stop_with_file_line_and_reason_or_are_counted(tmp_path, row, message):
    path = jsonl(tmp_path / "rows.jsonl", [PAIR, row, PAIR])
    with pytest.raises(UserError) as raised:
        texts(path)
    assert f"rows.jsonl:2: {message}" in str(raised.value) and "on_bad_row: skip" in str(raised.value)
    skipping = stream(path, on_bad_row="skip")
    assert sum(len(host.documents) for host in skipping) == 2
    assert skipping.statistics.skipped == 1 and skipping.statistics.rows == 3


def test_a_broken_line_stops_or_is_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + '\n{"prompt": \n' + json.dumps(PAIR))
    with pytest.raises(UserError, match="rows.jsonl:2: not JSON"):
        texts(path)
    assert texts(path, on_bad_row="skip") == EXPECTED * 2


def test_csv_rows_with_another_number_of_fields(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\n2+3?,5\nonly\n2+3?,5,more\n")
    with pytest.raises(UserError, match="rows.csv:3: expected 2 fields"):
        texts(path)
    assert texts(path, on_bad_row="skip") == EXPECTED


def test_junk_is_junk_with_skip_too(tmp_path):
    path = tmp_path / "junk.jsonl"
    path.write_bytes(b"\x80\x81\n" * 5)
    with pytest.raises(UserError, match="junk.jsonl: none of the first 5 rows can be read"):
        stream(path, on_bad_row="skip")


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('no tools here') }}")
    path = jsonl(tmp_path / "rows.jsonl", [PAIR])
    with pytest.raises(UserError, match="rows.jsonl:1: the chat template refuses the conversation .no tools here"):
        texts(path, chat_template=str(template))
    with pytest.raises(UserError, match="chat_template: .*none.jinja cannot be read"):
        texts(path, chat_template=str(tmp_path / "none.jinja"))


def test_ids_beyond_the_model_are_refused(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [PAIR])
    with pytest.raises(UserError, match="rows.jsonl:1: token id .* beyond the model's 50 ids"):
        next(DataStream(config(path), plain(), batch=1, vocab_size=50))


def test_text_with_a_teacher_prompt_is_refused():
    reader = choose_reader(SourceConfig(path="x", teacher_input_key="hint"), ["text", "hint"], "x")
    with pytest.raises(RowError, match="needs a conversation"):
        reader({"text": "a", "hint": "b"})
