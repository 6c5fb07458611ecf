"""Rows by number from files, saved datasets and the hub: the random access that shuffling and resuming rest on."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kdjax.data.formats import RowError
from kdjax.errors import UserError, first_line

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")


@runtime_checkable
class Rows(Protocol):
    """``rows[i]`` is a mapping from column to value, or raises RowError; ``where(i)`` says where it stands."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    def where(self, index: int) -> str: ...


def open_rows(path: str, split: str | None = None) -> Rows:
    """Open a jsonl, json, csv, parquet or arrow file, a saved dataset folder, or a hub dataset.

    ``split`` names a split of a folder or hub dataset; for every kind it may end in a range of rows, as in
    ``train[:1000]``, ``[1000:]`` or ``train[90%:]``. Raises UserError for a file that is missing, empty or not what its
    ending says.
    """
    name, bounds = _parse_split(split, path)
    refuse_missing(path)
    file = Path(path)
    if file.is_dir():
        rows = _saved(file, name)
    elif file.suffix.lower() in KINDS:
        if file.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        if name:
            raise UserError(f"{path}: a single file has no split {name!r}; leave it out, or give a range as in [:1000]")
        rows = _OPENERS[file.suffix.lower()](file)
    elif file.exists():
        raise UserError(f"{path}: unknown kind of file {file.suffix!r}; known are {', '.join(KINDS)}")
    else:
        rows = _hub(path, name)
    if bounds is not None:
        rows = RowRange(rows, _resolve(bounds[0], len(rows), 0), _resolve(bounds[1], len(rows), len(rows)))
    if len(rows) == 0:
        raise UserError(f"{path}{f' ({split})' if split else ''}: the dataset has no rows")
    return rows


def refuse_missing(path: str) -> None:
    """Raise UserError where ``path`` is no file or folder and cannot be a hub dataset either. Opens nothing."""
    if Path(path).exists():
        return
    if Path(path).suffix.lower() in KINDS:
        raise UserError(f"{path}: no such file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?|[\w-]+(:[\w.-]+)?", path):
        raise UserError(f"{path}: no such file, folder or hub dataset")


class RowRange:
    """Rows ``start`` to ``stop`` of other rows."""

    def __init__(self, rows: Rows, start: int, stop: int):
        self._rows, self._range = rows, range(len(rows))[start:stop]

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._rows[self._range[index]]

    def where(self, index: int) -> str:
        return self._rows.where(self._range[index])


class JsonLines:
    """Lines of a file by number: their offsets are found once, the lines themselves stay on disk."""

    def __init__(self, path: Path):
        self.path = str(path)
        self._file = os.open(path, os.O_RDONLY)
        ends, at = [], 0
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at)
                at += len(block)
        stops = np.concatenate([*ends, [at]])
        starts = np.concatenate([[0], stops[:-1] + 1])
        lines = np.flatnonzero(stops - starts > 1)  # an empty line, or a lone carriage return, is no row
        self._starts, self._stops, self._lines = starts[lines], stops[lines], lines + 1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        start, stop = int(self._starts[index]), int(self._stops[index])
        try:
            row = json.loads(os.pread(self._file, stop - start, start))
        except json.JSONDecodeError as error:
            raise RowError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
        except UnicodeDecodeError as error:
            raise RowError(f"not text: byte {error.object[error.start]:#04x} is not UTF-8") from None
        except RecursionError:
            raise RowError("not JSON: nested too deeply") from None
        if not isinstance(row, dict):
            raise RowError(f"expected an object of columns, found {type(row).__name__}")
        return row

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"


class Listed:
    """Rows that are in memory, with a name for each."""

    def __init__(self, rows: Sequence[Any], names: Sequence[str]):
        self._rows, self._names = rows, names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = self._rows[index]
        if isinstance(row, RowError):
            raise RowError(*row.args)
        if not isinstance(row, dict):
            raise RowError(f"expected an object of columns, found {type(row).__name__}")
        return row

    def where(self, index: int) -> str:
        return self._names[index]


class Table:
    """Rows of a Hugging Face dataset, which stays on disk as a memory map."""

    def __init__(self, table: Any, path: str):
        self._table, self._path = table, path

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._table[int(index)]

    def where(self, index: int) -> str:
        return f"{self._path}: row {index}"


def _open_json(path: Path) -> Rows:
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); one object a line belongs in .jsonl") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text: byte {error.object[error.start]:#04x} is not UTF-8") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    return Listed(rows, [f"{path}: row {i}" for i in range(len(rows))])


def _open_csv(path: Path) -> Rows:
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KiB a field is below a long conversation
    rows, names = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            fields = len(reader.fieldnames or ())
            before = reader.line_num
            for row in reader:
                names.append(f"{path}:{before + 1}")
                before = reader.line_num
                if None in row or None in row.values():
                    row = RowError(f"expected {fields} fields as in the header, found another number")
                rows.append(row)
    except (csv.Error, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{path}: not a CSV file after row {len(rows)} ({reason})") from None
    return Listed(rows, names)


def _open_parquet(path: Path) -> Rows:
    datasets = _datasets()
    try:
        return Table(datasets.Dataset.from_parquet(str(path)), str(path))
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_line(error.__cause__ or error)})") from None


def _open_arrow(path: Path) -> Rows:
    datasets = _datasets()
    try:
        return Table(datasets.Dataset.from_file(str(path)), str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable arrow file ({first_line(error)})") from None


_OPENERS = {
    ".jsonl": JsonLines, ".json": _open_json, ".csv": _open_csv, ".parquet": _open_parquet, ".arrow": _open_arrow,
}  # fmt: skip


def _saved(path: Path, split: str) -> Rows:
    datasets = _datasets()
    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        raise UserError(f"{path}: not a saved dataset folder (dataset_info.json is missing); name a file in it instead")
    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: the saved dataset cannot be read ({first_line(error)})") from None
    if not isinstance(table, datasets.DatasetDict):
        if split:
            raise UserError(f"{path}: this dataset has no splits; leave out split {split!r}")
        return Table(table, str(path))
    return Table(table[_choose_split(list(table), split, str(path))], f"{path}")


def _hub(path: str, split: str) -> Rows:
    datasets = _datasets()
    name, _, subset = path.partition(":")
    try:
        splits = datasets.get_dataset_split_names(name, subset or None)
        return Table(datasets.load_dataset(name, subset or None, split=_choose_split(splits, split, path)), path)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: neither a file or folder here nor a dataset on the hub ({first_line(error)})"
        ) from None


def _choose_split(splits: list[str], split: str, path: str) -> str:
    chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
    if chosen not in splits:
        raise UserError(f"{path}: no split {chosen!r}; it has {', '.join(splits)}: set split to one of them")
    return chosen


def _parse_split(split: str | None, path: str) -> tuple[str, tuple[str, str] | None]:
    match = re.fullmatch(r"([^\[\]]*)(?:\[(\d*%?):(\d*%?)\])?", split or "")
    if match is None:
        raise UserError(f"{path}: split {split!r} is not a name with an optional range, as in train[:1000] or [90%:]")
    return match[1], None if match[2] is None else (match[2], match[3])


def _resolve(bound: str, rows: int, default: int) -> int:
    if not bound.strip("%"):
        return default
    return rows * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)


def _datasets() -> Any:
    import datasets  # slow to import, and only some sources need it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error it also raises
    return datasets
