"""the rows of the sources as questions, in file order: what a model is to answer, and what the answer should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from kdjax.data.formats import Message, RowError
from kdjax.data.prepare import make_encoder, open_source
from kdjax.errors import UserError


@dataclass(frozen=True, eq=False)
class Question:
    """What to answer.

    ``ids`` are the conversation as whoever answers reads it, with the header that asks the assistant to speak. With a
    ``teacher_input_key`` that is the teacher's prompt, and ``messages`` are still the student's. ``answer`` is the
    assistant's last turn in the row, if it has one, and ``row`` the row as it stands in the source.
    """

    where: str
    ids: Int32[np.ndarray, " T"]
    messages: tuple[Message, ...]
    row: Mapping[str, Any]
    tools: list[Any] | None = None
    answer: str | None = None

    @property
    def text(self) -> str:
        """The last message that is to be answered."""
        return content_text(self.messages[-1])


class Questions(Sequence[Question]):
    """The rows of all sources, one source after the other in file order; each is made when it is asked for.

    ``questions[i]`` raises RowError for a row that is malformed or has nothing to answer. Raises UserError for a source
    that cannot be read or holds plain text.
    """

    def __init__(self, sources: Sequence[Any], data: Any, tokenizer: Any):
        self._encoder = make_encoder(data, tokenizer)
        self._sources = [open_source(source, data) for source in sources]
        for source, (_, reader) in zip(sources, self._sources, strict=True):
            if reader.format == "text":
                raise UserError(
                    f"{source.path}: plain text has no prompts; name a source with conversations or prompts"
                )
        self._ends = np.cumsum([len(rows) for rows, _ in self._sources])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Question:
        rows, reader, at = self._find(index)
        row = rows[at]
        example = reader(row)
        messages, answer = split_answer(example.messages)
        asked = messages if example.teacher is None else split_answer(example.teacher)[0]
        ids = self._encoder.prompt(asked, example.tools)
        if not ids.size:
            raise RowError("the chat template renders nothing")
        return Question(rows.where(at), ids, messages, row, example.tools, answer)

    def where(self, index: int) -> str:
        """File and line of a row, whatever is in it."""
        rows, _, at = self._find(index)
        return rows.where(at)

    def _find(self, index: int) -> tuple[Any, Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        rows, reader = self._sources[number]
        return rows, reader, index - int(self._ends[number]) + len(rows)


def content_text(message: Message) -> str:
    """The text of a message; of one in parts, that of its text parts."""
    content = message["content"]
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
    return content or ""


def split_answer(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str | None]:
    """The conversation up to the assistant's last turn, and that turn, if the conversation ends with one."""
    answer = None
    if messages[-1]["role"] == "assistant":
        messages, answer = messages[:-1], content_text(messages[-1])
    if not messages or all(message["role"] == "system" for message in messages):
        raise RowError("there is nothing to answer: no message comes before the assistant's")
    content = messages[-1]["content"]
    if not content or (isinstance(content, str) and not content.strip()):
        raise RowError("the prompt is empty")
    return messages, answer
