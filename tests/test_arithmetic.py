"""The arithmetic task as shipped: what its script makes, rows that are right and apart, a small teacher and student."""

import importlib.util
import itertools
import json
import random

import jax
import numpy as np
import pytest
from data_tools import ROOT
from flax import nnx

from kdjax.config import load_config
from kdjax.data import load_tokenizer
from kdjax.generation.rewards import find_reward
from kdjax.models import load_model

FOLDER = ROOT / "examples" / "arithmetic"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_arithmetic", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name):
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def holds(line):
    left, result = line.split("=")
    return sum(map(int, left.split("+"))) == int(result)


def test_the_script_makes_what_is_shipped(make):
    problems = make.problems(0)
    assert list(map(make.row, itertools.islice(problems, 1000))) == rows("eval.jsonl")
    assert list(make.students_rows(itertools.islice(problems, 2000), 0)) == rows("train.jsonl")
    prompts = [row["prompt"] for row in itertools.chain(rows("eval.jsonl"), rows("train.jsonl"))]
    assert len(set(prompts)) == len(prompts) == 3000
    assert make.tokenizer().get_vocab() == load_tokenizer(FOLDER / "tokenizer").get_vocab()


def test_every_line_of_every_response_is_true():
    for row in rows("eval.jsonl"):
        *steps, last = row["response"].splitlines()
        total = sum(map(int, row["prompt"].split("+")))
        assert last == f"#### {total}" and len(steps) == row["prompt"].count("+")
        for step, following in itertools.pairwise([*steps, f"{total}+"]):
            assert holds(step) and step.split("=")[1] == following.split("+")[0]
        assert find_reward("gsm8k")(row["prompt"], row["response"], {"answer": row["response"]}) == 1.0


@pytest.mark.parametrize("share", [0.1, 0.05])
def test_a_slip_is_mended_on_the_next_line(make, share):
    """rows without their wrong lines are rows without slips"""
    slips, wrong, lines = random.Random(1), 0, 0
    for numbers in itertools.islice(make.problems(1), 500):
        clean, slipped = (make.row(numbers, draw, share)["response"].splitlines() for draw in (None, slips))
        assert [line for line in slipped if line.startswith("####") or holds(line)] == clean
        for line, following in itertools.pairwise(slipped):
            assert line in clean or line.partition("=")[0] == following.partition("=")[0]
        wrong, lines = wrong + len(slipped) - len(clean), lines + len(slipped) - 1
    assert wrong / lines == pytest.approx(share, rel=0.2)


def test_the_teacher_mends_a_slip(make):
    """behind a wrong result it begins the same addition again, and does not go on with what is wrong"""
    model, tokenizer = load_model(FOLDER / "teacher"), load_tokenizer(FOLDER / "teacher")
    slips, length, mended = random.Random(1), 128, []

    @nnx.jit
    def log_likelihoods(model, tokens):
        logs = jax.nn.log_softmax(model.logits(model(tokens)[:, :-1]))
        return jax.numpy.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[..., 0]

    for numbers in itertools.islice(make.problems(1), 60):
        prompt, lines = "+".join(map(str, numbers)), make.solve(numbers).splitlines()
        at = slips.randrange(len(lines) - 2)
        left, result = lines[at].split("=")
        wrong = make.wrong(int(result), slips)
        before = f"<|user|>{prompt}<|end|><|assistant|>" + "\n".join([*lines[:at], f"{left}={wrong}", ""])
        asked = before, f"{before}{left}=", f"{before}{wrong}+{numbers[at + 2]}="
        begun, *ways = (tokenizer(text)["input_ids"] for text in asked)
        found = log_likelihoods(model, np.array([way + [0] * (length - len(way)) for way in ways]))
        again, on = (found[i, len(begun) - 1 : len(way) - 1].sum() for i, way in enumerate(ways))
        mended.append(bool(again > on))
    assert np.mean(mended) > 0.9


def test_a_character_is_a_token():
    tokenizer = load_tokenizer(FOLDER / "tokenizer")
    text = '17+28=45\n#### 45 ~\\"}'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and len(tokenizer(text)["input_ids"]) == len(text)
    assert tokenizer.convert_ids_to_tokens(tokenizer("é<|end|>")["input_ids"]) == ["<|unknown|>", "<|end|>"]


def test_the_student_is_its_teacher_with_fewer_layers():
    student = load_config(ROOT / "configs" / "arithmetic.yaml").student
    teacher = load_model(FOLDER / "teacher", abstract=True)
    assert student.init == "layers" and len(student.layers) < teacher.config.num_hidden_layers
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(teacher, nnx.Param))) < 1e6
    assert (FOLDER / "teacher" / "model.safetensors").stat().st_size < 4e6
