"""A Hugging Face model folder: which tensors it holds, any slice of any of them, and arrays made of such slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
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
    files, where = files_of(folder)
    with ExitStack() as stack:
        entries: dict[str, Entry] = {}
        handles: dict[str, Any] = {}
        for file in files:
            handles[file] = handle = stack.enter_context(open_tensors(folder / file))
            for name in handle.keys():
                if name in entries:
                    raise UserError(f"{folder}: tensor {name} is stored twice, in {entries[name].file} and {file}")
                _, entries[name] = tensor_of(handle, folder, file, name)
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


def tensor_of(handle: Any, folder: Path, file: str, name: str) -> tuple[Any, Entry]:
    """What reads slices of tensor ``name`` of an open ``file``, and what the tensor is.

    Raises UserError where the file has no such tensor, or one of a dtype that is not in FILE_DTYPES.
    """
    try:
        view = handle.get_slice(name)
    except SafetensorError:
        raise UserError(f"{folder / INDEX}: puts {name} in {file}, which does not hold it") from None
    if view.get_dtype() not in FILE_DTYPES:
        raise UserError(f"{folder / file}: {name} is {view.get_dtype()}; only {', '.join(FILE_DTYPES)} are supported")
    return view, Entry(file, tuple(view.get_shape()), FILE_DTYPES[view.get_dtype()])


def files_of(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The safetensors files of a model folder and, where it has an index, which of them holds each tensor.

    Raises UserError for an index without such a mapping, and where nothing says which files are meant.
    """
    if (folder / INDEX).exists():
        where = read_json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise UserError(f"{folder / INDEX}: weight_map is not a mapping of tensor to file")
        return sorted(set(where.values())), where
    if (folder / SINGLE).exists():
        return [SINGLE], None
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(files) == 1:
        return files, None
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files and no {INDEX} to say which belong together")
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise UserError(f"{folder}: only pickled weights; convert them to safetensors (save_pretrained does) first")
    raise UserError(f"{folder}: no safetensors file; a model folder needs {SINGLE}, or shards with {INDEX}")


def placed(
    shape: tuple[int, ...], sharding: NamedSharding | None, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """The array whose slices ``read`` gives, each read once, as ``sharding`` says (None: on the default device).

    What ``read`` gives must be fresh and never written again: on a CPU JAX keeps pointing at it instead of copying.
    """
    done: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def slices(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if key not in done:
            done[key] = read(tuple(slice(start, stop) for start, stop in key))
        return done[key]

    if sharding is None:
        value = jax.device_put(slices((slice(None),) * len(shape)))
    else:
        value = jax.make_array_from_callback(shape, sharding, slices)
    return value.block_until_ready()  # or the host would hold slices of many arrays still in flight
