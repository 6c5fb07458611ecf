"""The data as prompts: what the student is asked to continue, by number, in the order in which a run asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from kdjax.data.batch import Document
from kdjax.data.files import Rows
from kdjax.data.formats import Example, Message, RowError, RowReader
from kdjax.data.prepare import Prepare, open_sources
from kdjax.data.questions import split_answer
from kdjax.data.stream import order_rows
from kdjax.data.template import Encoder


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation up to where the assistant speaks, as the chat template shows it.

    ``teacher_ids`` is what the teacher reads instead, if that differs. ``documents`` are the row with the data's own
    response, none where it has none, and ``reference`` that response as text. ``row`` is the file's row, ``source`` its
    place.
    """

    ids: Int32[np.ndarray, " T"]
    teacher_ids: Int32[np.ndarray, " U"] | None
    documents: tuple[Document, ...]
    reference: str | None
    row: Mapping[str, Any]
    source: str

    def __len__(self) -> int:
        """Tokens of the longer of the two prompts."""
        return max(len(self.ids), 0 if self.teacher_ids is None else len(self.teacher_ids))


@dataclass(frozen=True)
class Fault:
    """Why a row is no prompt: where it stands, and what is wrong with it."""

    text: str


class Prompts:
    """``prompts[i]`` is the i-th prompt of an endless sequence, or a Fault; the order is the DataStream's.

    A row's prompt is its conversation without a last turn of the assistant. Arguments and errors as DataStream's.
    """

    def __init__(self, data: Any, tokenizer: Any, *, seed: int, vocab_size: int | None = None):
        weights = [source.weight for source in data.train]
        opened = open_sources(
            data.train,
            data,
            tokenizer,
            max_len=data.max_len,
            vocab_size=vocab_size,
            seed=seed,
            prepare=_PreparePrompt,
        )
        self.sizes = [len(rows) for rows in opened]
        self._rows = order_rows(opened, weights, data.shuffle, seed)

    def __getitem__(self, index: int) -> Prompt | Fault:
        return self._rows[index]


class _PreparePrompt:
    def __init__(
        self, rows: Rows, reader: RowReader, encoder: Encoder, data: Any, max_len: int, vocab_size: int | None
    ):
        self._rows, self._reader, self._encoder, self._vocab_size = rows, reader, encoder, vocab_size
        self._documents = Prepare(rows, reader, encoder, data, max_len, vocab_size)

    def __call__(self, index: int) -> Prompt | Fault:
        where = self._rows.where(index)
        try:
            row = self._rows[index]
            example = self._reader(row)
            ids = self._ids(example, example.messages)
            teacher_ids = None if example.teacher is None else self._ids(example, example.teacher)
            documents, reference = (), split_answer(example.messages)[1]
            if reference is not None:
                prepared = self._documents(index)
                if prepared.bad is not None:
                    return Fault(prepared.bad)
                documents = prepared.documents
        except RowError as error:
            return Fault(f"{where}: {error}")
        return Prompt(ids, teacher_ids, documents, reference, row, where)

    def _ids(self, example: Example, messages: tuple[Message, ...]) -> Int32[np.ndarray, " T"]:
        if example.text is not None:
            raise RowError("plain text has no prompt that a student could answer; give conversations or prompts")
        ids = self._encoder.prompt(split_answer(messages)[0], example.tools)
        if not ids.size:
            raise RowError("the chat template renders the prompt to nothing")
        if self._vocab_size is not None and int(ids.max()) >= self._vocab_size:
            raise RowError(f"token id {ids.max()} is beyond the model's {self._vocab_size} ids; use its own tokenizer")
        return ids
