"""which ids are real, and when two vocabularies are the same."""

import subprocess
import sys

import numpy as np
import pytest

from kdjax.config import from_dict
from kdjax.data import compare_vocabularies, load_tokenizer, valid_ids
from kdjax.errors import UserError
from kdjax.training.student import tokenizer_path


class Words:
    """A tokenizer's vocabulary and nothing else."""

    def __init__(self, ordinary: dict[str, int], added: dict[str, int] | None = None):
        self.vocab, self.added = ordinary, added or {}

    def get_vocab(self):
        return self.vocab | self.added

    @property
    def added_tokens_decoder(self):
        return {i: name for name, i in self.added.items()}


WORDS = {"a": 0, "b": 1, "c": 2}


def test_valid_ids_follow_the_vocabulary_and_not_its_length():
    gaps = Words(WORDS, {"<end>": 6})
    assert valid_ids(gaps, 9).tolist() == [True, True, True, False, False, False, True, False, False]
    assert valid_ids(gaps, 4).tolist() == [True, True, True, False]  # tokens beyond the head


def test_the_shipped_tokenizer_fills_its_head(root):
    valid = valid_ids(load_tokenizer(root / "examples" / "tokenizer"), 4100)
    assert valid.dtype == bool and np.flatnonzero(~valid).tolist() == [4096, 4097, 4098, 4099]


def test_the_shipped_tokenizer_says_every_text(root):
    tokenizer = load_tokenizer(root / "examples" / "tokenizer")
    for text in ("48/2 = <<48/2=24>>24", "día 🙂\n\t x  y", "#### 1,000.50"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.bos_token is None
    assert [tokenizer.decode([i]) for i in tokenizer("120")["input_ids"]] == ["1", "2", "0"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_special_tokens_of_one_side_are_listed():
    match = compare_vocabularies(Words(WORDS, {"<end>": 3}), Words(WORDS, {"<end>": 3, "<think>": 4}))
    assert match.student_only == {} and match.teacher_only == {"<think>": 4}
    match = compare_vocabularies(Words(WORDS, {"<end>": 3, "<tool>": 5}), Words(WORDS, {"<end>": 3}))
    assert match.student_only == {"<tool>": 5} and match.teacher_only == {}
    (line,) = match.lines()
    assert line == "special tokens that only the student knows, masked in every divergence: <tool> (5)"
    many = compare_vocabularies(Words(WORDS), Words(WORDS, {f"<{i}>": i for i in range(3, 14)}))
    (line,) = many.lines()
    assert "only the teacher knows" in line and line.endswith("<10> (10) and 3 more")


def test_a_student_of_chosen_layers_keeps_the_tokenizer_of_its_embedding():
    values = {"teacher": {"path": "t"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    layers = {"init": "layers", "layers": [0]}
    for student, expected in ((layers, "t"), (layers | {"path": "s"}, "s"), ({"path": "s", "init": "random"}, "t")):
        assert tokenizer_path(from_dict(values | {"student": student})) == expected


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (Words({"a": 0, "c": 1, "b": 2}), "'b' is id 1 to the student and id 2 to the teacher .4 entries differ"),
        (Words({"a": 0, "b": 1}), "'c' is id 2 to the student and not known to the teacher"),
        (Words(WORDS | {"d": 3}), "'d' .id 3. is known to the teacher only"),
    ],
)
def test_ordinary_tokens_that_differ_are_refused(teacher, reason):
    with pytest.raises(UserError, match=reason) as raised:
        compare_vocabularies(Words(WORDS), teacher)
    assert "use a teacher with the student's tokenizer" in str(raised.value)


def test_a_renamed_special_needs_the_map():
    student, teacher = Words(WORDS, {"<eot>": 3}), Words(WORDS, {"<|im_end|>": 3})
    with pytest.raises(UserError, match="id 3 is '<eot>' to the student.*data.special_token_map"):
        compare_vocabularies(student, teacher)
    match = compare_vocabularies(student, teacher, {"<eot>": "<|im_end|>"})
    assert not match.student_only and not match.teacher_only
    with pytest.raises(UserError, match="special_token_map.*one id"):
        compare_vocabularies(student, teacher, {"<eot>": "<other>"})


def test_a_special_with_another_id_is_refused():
    with pytest.raises(UserError, match="'<end>' has id 3 for the student and 4 for the teacher"):
        compare_vocabularies(Words(WORDS, {"<end>": 3}), Words(WORDS, {"<end>": 4}))


def test_a_token_that_is_added_here_and_ordinary_there_is_not_the_same():
    with pytest.raises(UserError, match="vocabularies differ"):
        compare_vocabularies(Words(WORDS), Words({"a": 0, "b": 1}, {"c": 2}))


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="the hub does not give it"):
        load_tokenizer("nobody/has-this-model")


def test_a_tokenizer_in_the_home_folder(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(root / "examples" / "tokenizer")
    assert load_tokenizer("~/mine").get_vocab() == load_tokenizer(root / "examples" / "tokenizer").get_vocab()


def test_the_committed_script_makes_the_committed_tokenizer(root, tmp_path):
    command = [sys.executable, str(root / "examples" / "train_tokenizer.py"), "--out", str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == f"4,096 entries written to {tmp_path}\n"
    made, shipped = (sorted(folder.iterdir()) for folder in (tmp_path, root / "examples" / "tokenizer"))
    assert [(f.name, f.read_bytes()) for f in made] == [(f.name, f.read_bytes()) for f in shipped]
