"""A Hugging Face model folder: which tensors it holds, and any slice of any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from kdjax.errors import UserError
from kdjax.models.config import ModelConfig, read_json
from kdjax.models.weights import IGNORABLE, Weight, check_names

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FILE_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


@dataclass(frozen=True)
class Entry:
    file: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Checkpoint:
    """The tensors of an open model folder. Reading is by slices and copies, so nothing points into the mapped file."""

    def __init__(self, folder: Path, entries: dict[str, Entry], handles: dict[str, Any]) -> None:
        self.folder, self.entries, self._handles = folder, entries, handles

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A fresh array with ``index`` of tensor ``name`` (None: all of it), in the file's dtype."""
        handle = self._handles[self.entries[name].file]
        try:
            return handle.get_slice(name)[index] if index else handle.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{self.folder / self.entries[name].file}: cannot read {name} ({error})") from None

    def part(self, row: Weight, name: str, index: tuple[slice, ...], config: ModelConfig) -> np.ndarray:
        """``index`` of one layer's parameter of a table row, read from tensor ``name``.

        Merged dimensions are read as the range of their first one, then cut, so a shard of heads reads its rows only.
        """
        shape, dims = row.part_shape(config), iter(range(len(index)))
        outer, rest, sizes = [], [], []
        for group in row.groups:
            first, *others = (next(dims) for _ in group)
            inner = int(np.prod([shape[d] for d in others], dtype=int))
            start, stop, _ = index[first].indices(shape[first])
            outer.append(slice(start * inner, stop * inner))
            sizes += [stop - start, *(shape[d] for d in others)]
            rest += [slice(None), *(index[d] for d in others)]
        return self.read(name, tuple(outer)).reshape(sizes)[tuple(rest)]

    def check(self, config: ModelConfig) -> None:
        """Exactly the tensors of the table, in its shapes; UserError names every kind of misfit.

        Rotary buffers that follow from the configuration are passed over. A tied head may be stored as well, provided
        that it equals the embedding: a differing one means that config.json is wrong about tying.
        """
        found = {name: entry.shape for name, entry in self.entries.items() if not IGNORABLE.fullmatch(name)}
        head, table = "lm_head.weight", "model.embed_tokens.weight"
        if config.tie_word_embeddings and head in found:
            copy = found.pop(head)
            if copy != found.get(table) or not self._equal(head, table):
                raise UserError(
                    f"{self.folder}: tie_word_embeddings is true, yet {head} differs from {table}; "
                    "set tie_word_embeddings: false in config.json or remove the tensor"
                )
        check_names(found, config, str(self.folder))

    def _equal(self, first: str, second: str, rows: int = 8192) -> bool:
        """Bitwise, a few rows at a time."""
        count = self.entries[first].shape[0]
        pieces = (slice(i, min(i + rows, count)) for i in range(0, count, rows))
        return all(np.array_equal(self.read(first, (s,)), self.read(second, (s,))) for s in pieces)


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """Open every shard of ``folder``. Raises UserError for a missing shard, a damaged file, a tensor stored twice, an
    index that disagrees with its shards, or a dtype other than float32, bfloat16 and float16.
    """
    where = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).exists() else None
    if where is not None and not isinstance(where, dict):
        raise UserError(f"{folder / INDEX}: weight_map is not a mapping of tensor to file")
    with ExitStack() as stack:
        entries: dict[str, Entry] = {}
        handles: dict[str, Any] = {}
        for file in _files(folder, where):
            handles[file] = handle = stack.enter_context(open_tensors(folder / file))
            for name in handle.keys():
                if name in entries:
                    raise UserError(f"{folder}: tensor {name} is stored twice, in {entries[name].file} and {file}")
                view = handle.get_slice(name)
                if view.get_dtype() not in FILE_DTYPES:
                    raise UserError(
                        f"{folder / file}: {name} is {view.get_dtype()}; only {', '.join(FILE_DTYPES)} are supported"
                    )
                entries[name] = Entry(file, tuple(view.get_shape()), FILE_DTYPES[view.get_dtype()])
        held = {name: entry.file for name, entry in entries.items()}
        for name in sorted({**held, **where}) if where is not None else ():
            if held.get(name) != where.get(name):
                said, found = where.get(name, "no file"), held.get(name, "no file")
                raise UserError(f"{folder / INDEX}: puts {name} in {said}, but it is in {found}")
        yield Checkpoint(folder, entries, handles)


def open_tensors(file: Path) -> Any:
    """What safetensors reads of ``file``, to be used in a ``with``. Raises UserError if it is missing or damaged."""
    try:
        return safe_open(file, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file, though {INDEX} names it") from None
    except SafetensorError as error:
        raise UserError(f"{file}: damaged or cut-off safetensors file ({error}); fetch it again") from None


def _files(folder: Path, weight_map: dict[str, str] | None) -> list[str]:
    if weight_map is not None:
        return sorted(set(weight_map.values()))
    if (folder / SINGLE).exists():
        return [SINGLE]
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files and no {INDEX} to say which belong together")
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise UserError(f"{folder}: only pickled weights; convert them to safetensors (save_pretrained does) first")
    raise UserError(f"{folder}: no safetensors file; a model folder needs {SINGLE}, or shards with {INDEX}")
