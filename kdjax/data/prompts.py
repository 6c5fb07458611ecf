"""The rows of the sources as prompts: what a model is to answer, and what the answer should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32

from kdjax.data.batch import Document
from kdjax.data.formats import Message, RowError
from kdjax.data.prepare import Prepare, make_encoder, open_source
from kdjax.data.stream import order_rows
from kdjax.data.template import Encoder
from kdjax.errors import UserError


@dataclass(frozen=True, eq=False)
class Prompt:
    """A row's conversation up to where the assistant speaks.

    ``ids`` are these ``messages`` through the chat template, with the header that asks for an answer, and
    ``teacher_ids`` what the teacher reads instead, if that differs. ``answer`` is the assistant's last turn in the row,
    if the row ends with one, ``row`` the row as it stands in its file, and ``source`` its place.
    ``documents`` are the row with its own answer, where they were asked for.
    """

    ids: Int32[np.ndarray, " T"]
    teacher_ids: Int32[np.ndarray, " U"] | None
    messages: tuple[Message, ...]
    answer: str | None
    row: Mapping[str, Any]
    source: str
    tools: list[Any] | None = None
    documents: tuple[Document, ...] = ()

    @property
    def text(self) -> str:
        """The last message, the one that is to be answered: what rewards are shown as the prompt."""
        return _content(self.messages[-1])

    def __len__(self) -> int:
        """Tokens of the longer of the two prompts."""
        return max(len(self.ids), 0 if self.teacher_ids is None else len(self.teacher_ids))


@dataclass(frozen=True)
class Fault:
    """Why a row is no prompt: where it stands, and what is wrong with it."""

    text: str


class Prompts(Sequence[Prompt]):
    """The rows of all sources, one source after the other in file order; each is made when it is asked for.

    ``prompts[i]`` raises RowError for a row that is malformed or has nothing to answer. Raises UserError for a source
    that cannot be read or holds plain text.
    """

    def __init__(self, sources: Sequence[Any], data: Any, tokenizer: Any):
        encoder = make_encoder(data, tokenizer)
        self._sources = [_OfSource(source, data, encoder) for source in sources]
        self._ends = np.cumsum([len(source.rows) for source in self._sources])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Prompt:
        source, at = self._find(index)
        return source.read(at)

    def where(self, index: int) -> str:
        """File and line of a row, whatever is in it."""
        source, at = self._find(index)
        return source.rows.where(at)

    def _find(self, index: int) -> tuple[_OfSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self._sources[number]
        return source, index - int(self._ends[number]) + len(source.rows)


class EndlessPrompts:
    """``prompts[i]`` is the i-th prompt of an endless sequence, or a Fault; the order is the DataStream's.

    With ``documents``, rows with an answer carry it as documents to train on, and one whose answer cannot be trained on
    is a Fault. Arguments and errors otherwise as DataStream's, and as those of ``Prompts``.
    """

    def __init__(self, data: Any, tokenizer: Any, *, seed: int, vocab_size: int | None = None, documents: bool = True):
        encoder = make_encoder(data, tokenizer)
        sources = [_OfSource(source, data, encoder, vocab_size, documents) for source in data.train]
        self.sizes = [len(source.rows) for source in sources]
        opened = [
            grain.MapDataset.source(range(size)).seed(seed + number).map(source)
            for number, (size, source) in enumerate(zip(self.sizes, sources, strict=True))
        ]
        self._rows = order_rows(opened, [source.weight for source in data.train], data.shuffle, seed)

    def __getitem__(self, index: int) -> Prompt | Fault:
        return self._rows[index]


class _OfSource:
    """The prompts of one source, by row: ``read`` raises RowError, a call gives a Fault instead."""

    def __init__(
        self, source: Any, data: Any, encoder: Encoder, vocab_size: int | None = None, documents: bool = False
    ):
        self.rows, self._reader = open_source(source, data)
        if self._reader.format == "text":
            raise UserError(f"{source.path}: plain text has no prompts; name a source with conversations or prompts")
        self._encoder, self._vocab_size = encoder, vocab_size
        self._documents = None
        if documents:
            self._documents = Prepare(self.rows, self._reader, encoder, data, data.max_len, vocab_size)

    def read(self, index: int) -> Prompt:
        row = self.rows[index]
        example = self._reader(row)
        messages, answer = _split_answer(example.messages)
        ids, teacher_ids = self._ids(self._encoder, messages, example.tools), None
        if example.teacher is not None or self._encoder.teacher is not None:
            asked = messages if example.teacher is None else _split_answer(example.teacher)[0]
            teacher_ids = self._ids(self._encoder.teacher or self._encoder, asked, example.tools)
        return Prompt(ids, teacher_ids, messages, answer, row, self.rows.where(index), example.tools)

    def __call__(self, index: int) -> Prompt | Fault:
        try:
            prompt = self.read(index)
        except RowError as error:
            return Fault(f"{self.rows.where(index)}: {error}")
        if self._documents is None or prompt.answer is None:
            return prompt
        prepared = self._documents(index)
        return Fault(prepared.bad) if prepared.bad is not None else replace(prompt, documents=prepared.documents)

    def _ids(self, encoder: Encoder, messages: tuple[Message, ...], tools: list[Any] | None) -> Int32[np.ndarray, " T"]:
        ids = encoder.prompt(messages, tools)
        if not ids.size:
            raise RowError("the chat template renders the prompt to nothing")
        if self._vocab_size is not None and int(ids.max()) >= self._vocab_size:
            raise RowError(f"token id {ids.max()} is beyond the model's {self._vocab_size} ids; use its own tokenizer")
        return ids


def response_text(tokenizer: Any, ids: Int32[np.ndarray, " R"], ends: Set[int]) -> str:
    """A sampled response as people and rewards read it: without the token that ended it, nor special ones."""
    kept = ids[:-1] if len(ids) and int(ids[-1]) in ends else ids
    return tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _content(message: Message) -> str:
    """The text of a message; of one in parts, that of its text parts."""
    content = message["content"]
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
    return content or ""


def _split_answer(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str | None]:
    """The conversation up to the assistant's last turn, and that turn, if the conversation ends with one."""
    answer = None
    if messages[-1]["role"] == "assistant":
        messages, answer = messages[:-1], _content(messages[-1])
    if not messages or all(message["role"] == "system" for message in messages):
        raise RowError("there is nothing to answer: no message comes before the assistant's")
    content = messages[-1]["content"]
    if not content or (isinstance(content, str) and not content.strip()):
        raise RowError("the prompt is empty")
    return messages, answer
