"""One row of a source → its documents, or the reason why there are none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from kdjax.data.batch import Document
from kdjax.data.files import RowRange, Rows, open_rows
from kdjax.data.formats import RowError, RowReader, choose_reader
from kdjax.data.template import Encoder
from kdjax.errors import UserError


@dataclass(frozen=True)
class Prepared:
    """What became of a row: documents to train on, and what was left out of it.

    ``bad`` is the fault of a malformed row, with its place. The other numbers count documents: too long and dropped,
    too long and cut, without a loss token. ``longest`` is the length of the longest before that.
    """

    documents: tuple[Document, ...] = ()
    bad: str | None = None
    dropped: int = 0
    truncated: int = 0
    without_loss: int = 0
    longest: int = 0


class Prepare:
    """Maps a row number of one source to what becomes of the row; called from several threads."""

    def __init__(
        self, rows: Rows, reader: RowReader, encoder: Encoder, data: Any, max_len: int, vocab_size: int | None
    ):
        self._rows, self._reader, self._encoder = rows, reader, encoder
        self._truncate, self._max_len, self._vocab_size = data.on_long_row == "truncate", max_len, vocab_size

    def __call__(self, index: int) -> Prepared:
        where = self._rows.where(index)
        try:
            documents = self._encoder(self._reader(self._rows[index]), where)
            for document in documents:
                self._check_ids(document)
        except RowError as error:
            return Prepared(bad=f"{where}: {error}")
        kept, dropped, truncated, without_loss = [], 0, 0, 0
        longest = max(_length(document) for document in documents)
        for document in documents:
            if _length(document) > self._max_len:
                if not self._truncate:
                    dropped += 1
                    continue
                truncated += 1
                document = truncate(document, self._max_len)
            if document is None or not len(document.labels):
                without_loss += 1
            else:
                kept.append(document)
        return Prepared(tuple(kept), None, dropped, truncated, without_loss, longest)

    def _check_ids(self, document: Document) -> None:
        top = max(int(ids.max()) for ids in (document.ids, document.teacher_view[0]))
        if self._vocab_size is not None and top >= self._vocab_size:
            raise RowError(f"token id {top} is beyond the model's {self._vocab_size} ids; use its own tokenizer")


def truncate(document: Document, max_len: int) -> Document | None:
    """The document cut at its end to at most ``max_len`` tokens, and what the teacher reads to the same loss tokens.

    None when nothing that carries loss is left.
    """
    student, teacher = document.loss_rows, np.flatnonzero(document.teacher_view[1][1:])
    # loss row r needs tokens up to r + 1
    kept = min(np.searchsorted(student, max_len - 1), np.searchsorted(teacher, max_len - 1))
    if kept == 0:
        return None
    # cut behind the last loss token that stays, so that both sides keep the same ones
    end = int(student[kept - 1]) + 2 if kept < len(student) else max_len
    ids, loss = document.ids[:end], document.loss[:end]
    if document.teacher_ids is None:
        return Document(ids, loss, document.source)
    end = int(teacher[kept - 1]) + 2
    return Document(ids, loss, document.source, document.teacher_ids[:end], document.teacher_loss[:end])


class Opened(NamedTuple):
    """A source: what ``Prepare`` makes of its rows, in file order, and whether they go through the chat template."""

    rows: grain.MapDataset
    templated: bool


def open_sources(
    sources: Sequence[Any],
    data: Any,
    tokenizer: Any,
    *,
    max_len: int,
    vocab_size: int | None,
    seed: int,
) -> list[Opened]:
    """The sources, each shuffled by a seed of its own if at all. Raises UserError for one that cannot be read."""
    encoder = make_encoder(data, tokenizer)
    opened = []
    for source in sources:
        rows, reader = open_source(source, data)
        made = Prepare(rows, reader, encoder, data, max_len, vocab_size)
        dataset = grain.MapDataset.source(range(len(rows))).seed(seed + len(opened)).map(made)
        opened.append(Opened(dataset, templated=reader.format != "text"))
    return opened


def first_documents(sources: Sequence[Opened], count: int) -> list[Document]:
    """At most ``count`` documents to train on, equally many from the start of each source; other rows are passed over.

    Tokenizes no further than it needs to.
    """
    share, found = -(-count // max(1, len(sources))), []
    for rows, _ in sources:
        found += itertools.islice((document for i in range(len(rows)) for document in rows[i].documents), share)
    return found[:count]


def open_source(source: Any, data: Any) -> tuple[Rows, RowReader]:
    """The rows of one source and what reads them. Raises UserError when it cannot be read."""
    rows = open_rows(source.path, source.split)
    if source.max_samples is not None:
        rows = RowRange(rows, 0, source.max_samples)
    return rows, choose_reader(source, _columns(rows, source.path, data.on_bad_row), source.path, system=data.system)


def make_encoder(data: Any, tokenizer: Any) -> Encoder:
    """What turns conversations into ids as the ``data`` group says. Raises UserError for an unreadable template."""
    teacher = None
    if data.teacher_reads_apart:
        template = "chat_template" if data.teacher_chat_template is None else "teacher_chat_template"
        args = data.template_args if data.teacher_template_args is None else data.teacher_template_args
        teacher = Encoder(tokenizer, chat_template=_read_template(data, template), template_args=args)
    return Encoder(
        tokenizer,
        chat_template=_read_template(data, "chat_template"),
        template_args=data.template_args,
        train_on=data.train_on,
        teacher=teacher,
    )


def _columns(rows: Rows, path: str, on_bad_row: str) -> list[str]:
    """Columns of the first row that can be read."""
    for i in range(min(len(rows), 1000)):
        try:
            return list(rows[i])
        except RowError as error:
            if on_bad_row == "stop":
                raise UserError(f"{rows.where(i)}: {error}") from None
    raise UserError(f"{path}: none of the first {min(len(rows), 1000)} rows can be read; is it what its name says?")


def _read_template(data: Any, key: str) -> str | None:
    path = getattr(data, key)
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not text")
        raise UserError(f"data.{key}: {path} cannot be read ({reason})") from None


def _length(document: Document) -> int:
    return max(len(document), len(document.teacher_view[0]))
