"""Rewards, checked by hand: which answers count as right, and what is said of a reward that cannot be used."""

from decimal import Decimal

import numpy as np
import pytest

from kdjax.data import Prompt
from kdjax.errors import UserError
from kdjax.generation.rewards import final_number, find_reward, register_reward, score, with_answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("####7", "7"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### -12", "-12"),
        ("#### \u22123.5", "-3.5"),
        ("#### +4", "4"),
        ("#### - 4", "-4"),
        ("#### $1,000", "1000"),
        ("#### -$20", "-20"),
        ("#### $-20", "-20"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### 5.", "5"),
        ("#### 5.00", "5"),
        ("#### 12 apples", "12"),
        ("#### 30%", "30"),
        ("#### 5\nThat is 6.", "5"),
        ("#### 1\n#### 2", "2"),  # a later answer replaces an earlier one
        ("##### 5", "5"),
        ("the answer is 5", None),  # no mark: no fallback to the last number
        ("#### ", None),
        ("####", None),
        ("", None),
        ("#### five", None),
        ("#### x = 5", None),
        ("#### 1,23", None),
        ("#### 12,3456", None),
        ("#### 1234,567", None),
        ("#### 3/4", None),
        ("#### 1.2.3", None),
        ("#### 10:30", None),
        ("#### -", None),
        ("#### --5", None),
        ("#### ,5", None),
    ],
)
def test_the_number_behind_the_mark(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        ("9 * 2 = 18\n#### 18", "She makes <<9*2=18>>18.\n#### 18", 1.0),
        ("#### 18.0", "#### 18", 1.0),
        ("#### 70,000", "#### 70000", 1.0),
        ("#### 180", "#### 18", 0.0),
        ("#### -18", "#### 18", 0.0),
        ("#### 0.1", "#### 0.10000000000000000001", 0.0),  # by value, not in floating point
        ("18", "#### 18", 0.0),
        ("#### 18\nno: #### 19", "#### 18", 0.0),
        ("", "#### 18", 0.0),
    ],
)
def test_gsm8k(response, answer, value):
    assert find_reward("gsm8k")("How many?", response, {"answer": answer}) == value


def test_gsm8k_refuses_a_row_without_a_number():
    for row in ({"answer": "eighteen"}, {"question": "How many?"}, {"answer": None}):
        with pytest.raises(UserError, match="answer"):
            find_reward("gsm8k")("How many?", "#### 1", row)


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        ("blue whale", "blue whale", 1.0),
        ("  blue\n whale ", "blue whale", 1.0),
        ("blue whale.", "blue whale", 0.0),
        ("Blue whale", "blue whale", 0.0),
        ("bluewhale", "blue whale", 0.0),
        ("", "", 1.0),
        ("7", 7, 1.0),
    ],
)
def test_exact_match(response, answer, value):
    assert find_reward("exact_match")("Which?", response, {"answer": answer}) == value


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("1 + 1 = 2\n#### 2", 1.0),
        ("#### -1,200.5  \n", 1.0),
        ("#### 2\ndone", 0.0),
        ("#### 2 apples", 0.0),
        ("so #### 2", 0.0),
        ("#### 1\n#### 2", 0.0),
        ("####", 0.0),
        ("2", 0.0),
        ("", 0.0),
    ],
)
def test_format(response, value):
    assert find_reward("format")("How many?", response, {}) == value


def test_a_reward_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("def short(prompt, response, row):\n    return -len(response)\n")
    assert find_reward(f"{tmp_path}/mine.py:short")("", "four", {}) == -4

    @register_reward("test_echo")
    def echo(prompt, response, row):
        return float(prompt == response)

    assert find_reward("test_echo")("a", "a", {}) == 1.0
    with pytest.raises(UserError, match="gsm8k"):
        find_reward("gsm8")


@pytest.mark.parametrize("value", [None, "right", float("nan"), float("inf")])
def test_a_reward_must_be_a_finite_number(value):
    with pytest.raises(UserError, match="broken.*finite"):
        score(broken(value), prompt({}), "")
    assert score(broken(True), prompt({}), "") == 1.0


def test_a_reward_that_fails_names_the_row(tmp_path):
    """and ends the run in order, with what it has learnt"""
    (tmp_path / "mine.py").write_text("def mine(prompt, response, row):\n    return row['mark']\n")
    with pytest.raises(UserError, match="reward 'mine' failed on rows:1: KeyError: 'mark'"):
        score(find_reward(f"{tmp_path}/mine.py:mine"), prompt({}), "")


def broken(value):
    def broken(prompt, response, row):
        return value

    return broken


def prompt(row, answer=None):
    return Prompt(np.array([5], np.int32), None, ({"role": "user", "content": "Which?"},), answer, row, "rows:1")


def test_the_answer_is_the_rows_own_column_or_the_reference():
    assert with_answer(prompt({"q": 1}, "the response")) == {"q": 1, "answer": "the response"}
    assert with_answer(prompt({"answer": "B"}, "worked out: B")) == {"answer": "B"}
    assert with_answer(prompt({"answer": None}, "B")) == {"answer": "B"}
    assert with_answer(prompt({"q": 1})) == {"q": 1}
