"""Tokenizers as vocabularies: loading one, which ids are real, and whether two mean the same by each id."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from kdjax.errors import UserError, first_line
from kdjax.folders import resolve

SHOWN = 8  # special tokens in a line


def load_tokenizer(path: str | Path) -> Any:
    """A fast tokenizer from a Hugging Face folder or hub id. Raises UserError when there is none."""
    from transformers import AutoTokenizer  # transformers imports torch where it is installed: only when needed

    folder = resolve(path, weights=False)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(f"{path}: no tokenizer in this folder (tokenizer.json is missing)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no tokenizer could be loaded; name a folder with tokenizer.json or a hub id ({first_line(error)})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: only a slow tokenizer; one with tokenizer.json is needed")
    return tokenizer


def valid_ids(tokenizer: Any, size: int) -> Bool[np.ndarray, " V"]:
    """Which of a head's ``size`` ids the tokenizer has a token for; the others are padding of the head.

    Ids have gaps, so this follows ``get_vocab()`` and not its length. Tokens beyond the head are left out: some
    published tokenizers list a few that their model never learnt.
    """
    valid = np.zeros(size, bool)
    ids = np.fromiter(tokenizer.get_vocab().values(), np.int64)
    valid[ids[ids < size]] = True
    return valid


@dataclass(frozen=True)
class VocabularyMatch:
    """Special tokens (token → id) that only one side knows: masked in every divergence."""

    student_only: dict[str, int]
    teacher_only: dict[str, int]

    def lines(self) -> Iterator[str]:
        """What a person should know of them."""
        for whose, names in (("student", self.student_only), ("teacher", self.teacher_only)):
            if names:
                listed = ", ".join(f"{name} ({token_id})" for name, token_id in list(names.items())[:SHOWN])
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                yield f"special tokens that only the {whose} knows, masked in every divergence: {listed}{more}"


def compare_vocabularies(
    student: Any, teacher: Any, special_token_map: Mapping[str, str] | None = None
) -> VocabularyMatch:
    """Check that every id means the same to both tokenizers, whatever their sizes.

    Ordinary tokens must agree exactly. Added tokens may be known to one side only. An added token with two names for
    one id must be in ``special_token_map`` (student's name → teacher's name). Raises UserError otherwise, naming an
    example.
    """
    special_token_map = dict(special_token_map or {})
    ours, our_specials = _split(student)
    theirs, their_specials = _split(teacher)
    differing = _first_difference(ours, theirs)
    if differing is not None:
        raise UserError(
            f"the vocabularies differ: {differing}; use a teacher with the student's tokenizer (no algorithm here "
            f"distils across tokenizers yet)"
        )
    for name, other in special_token_map.items():
        if our_specials.get(name) is None or our_specials[name] != their_specials.get(other):
            raise UserError(
                f"data.special_token_map: {name!r} has id {our_specials.get(name)} for the student and {other!r} has "
                f"id {their_specials.get(other)} for the teacher; a pair must be special tokens with one id"
            )
    names = {token_id: name for name, token_id in their_specials.items()}
    for name, token_id in our_specials.items():
        other = names.get(token_id, name)
        if other != name and special_token_map.get(name) != other:
            raise UserError(
                f"id {token_id} is {name!r} to the student and {other!r} to the teacher; if they mean the same, set "
                f"data.special_token_map: {{{name!r}: {other!r}}}, else use a teacher with the student's tokenizer"
            )
        if their_specials.get(name, token_id) != token_id:
            raise UserError(
                f"special token {name!r} has id {token_id} for the student and {their_specials[name]} for the teacher; "
                f"use a teacher with the student's tokenizer"
            )
    shared = set(our_specials.values()) & set(their_specials.values())
    return VocabularyMatch(
        student_only={name: i for name, i in our_specials.items() if i not in shared},
        teacher_only={name: i for name, i in their_specials.items() if i not in shared},
    )


def _split(tokenizer: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Ordinary tokens and added (special) ones."""
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    ordinary = {name: i for name, i in tokenizer.get_vocab().items() if name not in added}
    return ordinary, added


def _first_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    if ours == theirs:
        return None
    count = len(set(ours.items()) ^ set(theirs.items()))
    for name, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(name) != token_id:
            other = f"id {theirs[name]}" if name in theirs else "not known"
            return f"{_shown(name)} is id {token_id} to the student and {other} to the teacher ({count} entries differ)"
    name, token_id = min(((n, i) for n, i in theirs.items() if n not in ours), key=lambda item: item[1])
    return f"{_shown(name)} (id {token_id}) is known to the teacher only ({count} entries differ)"


def _shown(name: str) -> str:
    return repr(re.sub(r"\s+", " ", name[:40]))
