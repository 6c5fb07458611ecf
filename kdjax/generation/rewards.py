"""How good is an answer? Task rewards by name: the built-in ones, those a user registers, and ``path/my.py:function``.

A reward is ``reward(prompt, response, row) -> float``: the message that is answered and the response, both as text, and
the row of the data set with ``row["answer"]`` holding what is right (see ``with_answer``). 1.0 is right and 0.0 wrong
in all that ship here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from kdjax.data.prompts import Prompt
from kdjax.errors import UserError
from kdjax.registry import Registry

Reward = Callable[[str, str, Mapping[str, Any]], float]

_REGISTRY = Registry("reward", "reward")
register_reward: Callable[[str], Callable[[Reward], Reward]] = _REGISTRY.register
"""A decorator that registers a function as ``name``; raises ValueError when another function has the name."""

# Commas part whole groups of three. What goes on like a number (1,23 or 3/4 or 1.2.3) is not one, so it has no value.
_NUMBER = re.compile(r"[$€£]?\s*([-+\u2212]?)\s*[$€£]?\s*(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(\.\d+)?(?![\d,./:]*\d)")
_MARK = "####"


def find_reward(name: str) -> Reward:
    """The reward registered as ``name`` or written as ``file.py:function``. Raises UserError."""
    return _REGISTRY.get(name)


def score(reward: Reward, prompt: Prompt, response: str) -> float:
    """``reward``'s value of a response, as a finite float. Raises UserError when it returns or raises anything else.

    The one place where rewards are called: whoever asks, they see the prompt's last message, the response without its
    end token, and the row.
    """
    name = getattr(reward, "__name__", str(reward))
    try:
        value = reward(prompt.text, response, with_answer(prompt))
    except UserError:
        raise
    except Exception as error:  # whatever a user's function may raise: the run ends in order, with what it has learnt
        raise UserError(f"reward {name!r} failed on {prompt.source}: {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"reward {name!r} returned {value!r}; it must return a finite number for every answer")
    return number


def with_answer(prompt: Prompt) -> dict[str, Any]:
    """The row as rewards see it: its own ``answer`` column, or else the assistant's turn in it as ``answer``."""
    row = prompt.row
    return dict(row) if prompt.answer is None or row.get("answer") is not None else {**row, "answer": prompt.answer}


@register_reward("gsm8k")
def gsm8k(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """1.0 when the number behind the last ``####`` equals the one in ``row["answer"]``, else 0.0.

    Numbers are compared by value: 1,234 = 1234 = +1234.00 = $1,234. There is no fallback to the last number of a
    response without ``####``: one that was cut before its answer must not be right by chance. Follows the scoring of
    GSM8K (2110.14168).
    """
    truth = final_number(_answer(row))
    if truth is None:
        raise UserError(f"reward gsm8k: no number behind {_MARK} in the row's answer {_answer(row)[-60:]!r}")
    return float(final_number(response) == truth)


@register_reward("exact_match")
def exact_match(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """1.0 when the response is ``row["answer"]``, white space at the ends and its kind and amount aside, else 0.0."""
    return float(response.split() == _answer(row).split())


@register_reward("format")
def format_reward(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """1.0 when the response has one ``####``, on its last line, with a number and nothing else behind it, else 0.0."""
    lines = response.strip().splitlines() or [""]
    well_formed = response.count(_MARK) == 1 and lines[-1].startswith(_MARK)
    return float(well_formed and _number(lines[-1].removeprefix(_MARK).strip()) is not None)


def final_number(text: str) -> Decimal | None:
    """The number behind the last ``####`` of a text; None without a mark, or where no number begins right behind it.

    A unit or a full stop may follow the number on its line.
    """
    _, mark, rest = text.rpartition(_MARK)
    lines = rest.strip().splitlines()
    if not mark or not lines:
        return None
    found = _NUMBER.match(lines[0].strip())
    return _value(found) if found else None


def _number(text: str) -> Decimal | None:
    found = _NUMBER.fullmatch(text)
    return _value(found) if found else None


def _value(found: re.Match) -> Decimal:
    sign, whole, fraction = found.groups(default="")
    value = Decimal(f"{whole.replace(',', '') or 0}{fraction}")
    return -value if sign in ("-", "\u2212") else value


def _answer(row: Mapping[str, Any]) -> str:
    answer = row.get("answer")
    if answer is None:
        raise UserError(f"reward: the row has no 'answer' to compare with; its columns are {', '.join(row) or 'none'}")
    return str(answer)
