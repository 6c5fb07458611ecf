"""Chat templates before step 1: does a turn's end stop the engine, and do teacher and student read the same?"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from kdjax.config import DataConfig
from kdjax.data import Encoder, load_tokenizer
from kdjax.data.formats import RowError
from kdjax.data.prepare import make_encoder
from kdjax.errors import UserError


def check_end(tokenizer: Any, config: Any, stop_ids: set[int]) -> list[str]:
    """Whether the token that ends a turn in the chat template ends a response; returns warnings.

    Raises UserError when it is a special token and does not.
    """
    shown = _shown(_turn_encoder(config.data, tokenizer))
    if shown is None or shown.end in stop_ids:
        return []
    name = tokenizer.convert_ids_to_tokens(shown.end)
    if shown.end in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder):
        raise UserError(
            f"preflight: the chat template ends an assistant's turn with {name!r} (id {shown.end}), which does not "
            f"stop the student's engine (it stops at {sorted(stop_ids)}): set rollout.stop_ids: [{shown.end}]"
        )
    return [f"warning: the chat template ends a turn with {name!r}, no special token"]


def check_templates(stream: Any) -> list[str]:
    """What a person should know about how teacher and student read one conversation; nothing for plain text."""
    return compare_templates(stream.tokenizer, stream.config) if stream.data.templated else []


def compare_templates(tokenizer: Any, config: Any) -> list[str]:
    """Where the template that the teacher reads by, or else the one it came with, parts from the student's."""
    encoder = _turn_encoder(config.data, tokenizer)
    own, teacher = encoder.teacher, tokenizer
    reads = own
    if own is None:
        teacher = load_tokenizer(config.teacher.path)
        # As it came, so without the template that the run gives to both.
        reads = _turn_encoder(replace(config.data, chat_template=None), teacher)
    ours, theirs = _shown(encoder), _shown(reads)
    if ours is None:
        return []
    if theirs is None:
        return ["warning: the teacher has no chat template of its own; it reads the student's"]
    notes = []
    if theirs.end != ours.end:
        ends = tokenizer.convert_ids_to_tokens(ours.end), teacher.convert_ids_to_tokens(theirs.end)
        notes.append(f"warning: a turn ends with {ends[0]!r} for the student and with {ends[1]!r} for the teacher")
    shown = ("a question", ours.asked, theirs.asked), ("an answer", ours.answered, theirs.answered)
    differ = [(what, mine, its) for what, mine, its in shown if not np.array_equal(mine, its)]
    if differ:
        what, mine, its = differ[0]
        at = len(os.path.commonprefix([mine.tolist(), its.tolist()]))
        mine, its = tokenizer.decode(mine[at : at + 8]), teacher.decode(its[at : at + 8])
        thinking = ", so they disagree about thinking mode" if "think" in mine + its else ""
        where = f"from token {at} on (student: {mine!r}, teacher: {its!r}){thinking}"
        if own is None:
            notes.append(
                f"warning: the teacher's own chat template shows {what} otherwise than the student's, {where}; it "
                f"reads the student's form: data.teacher_chat_template can give it its own"
            )
        else:
            notes.append(f"the teacher reads {what} otherwise than the student, {where}")
    if own is not None and not notes:
        notes.append("warning: data.teacher_chat_template and teacher_template_args change nothing of what it reads")
    return notes


class _Shown(NamedTuple):
    """A short conversation in a template: ids of its question as a prompt, of all up to the token that ends the answer,
    and this token."""

    asked: np.ndarray
    answered: np.ndarray
    end: int


def _turn_encoder(data: DataConfig, tokenizer: Any) -> Encoder:
    """The encoder of the run, but that the mask shows where the assistant's turn ends, whatever is trained on."""
    return make_encoder(replace(data, train_on="assistant"), tokenizer)


def _shown(encoder: Encoder) -> _Shown | None:
    """None without a chat template."""
    asked = ({"role": "user", "content": "1 + 1?"},)
    try:
        ids, loss = encoder.last_turn((*asked, {"role": "assistant", "content": "2"}))
        last = int(np.flatnonzero(loss)[-1])
        return _Shown(encoder.prompt(asked), ids[:last], int(ids[last]))
    except (UserError, RowError):
        return None
