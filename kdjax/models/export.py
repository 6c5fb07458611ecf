"""From a model back to a Hugging Face folder that plain transformers loads: all of it or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.disk import free_bytes, size_text, why_full
from kdjax.errors import UserError
from kdjax.folders import resolve
from kdjax.models.checkpoint import FILE_DTYPES, INDEX, SINGLE
from kdjax.models.config import read_json
from kdjax.models.weights import hf_tensors, weight_table

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION, ABOUT = "generation_config.json", "kdjax.json"
_TAGS = {str(dtype): tag for tag, dtype in FILE_DTYPES.items()}
# What a source's config.json says of itself and not of the student.
_STALE = ("quantization_config", "auto_map", "layer_types", "max_window_layers", "transformers_version")
_LEFT = re.compile(r"\.(.+)\.\d+\.(tmp|old)")  # the number is the process's
_KNOWN_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md")


def export_hf(
    model: nnx.Module,
    out_dir: str | Path,
    source: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    entries: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    stop_ids: Collection[int] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write safetensors, config.json, generation_config.json, tokenizer files and chat template to ``out_dir``.

    The folder is made under another name and renamed when complete; an earlier export there is replaced at that moment
    and survives any failure before it. One tensor at a time is on the host.

    Args:
        source: folder or hub id whose ids, generation settings, tokenizer and template go along.
        tokenizer: take tokenizer and template from here instead.
        dtype: of the stored weights; None keeps the parameters' dtype.
        entries: of config.json beside the shape, such as token ids, over those of ``source``.
        stop_ids: end an answer as well, beside those in the generation settings of ``source``.
        about: what else is to be known of these weights, as JSON in ``ABOUT`` beside them.
        max_shard_bytes: tensors beyond it go into the next file, with an index.

    Raises:
        UserError: the disk is too small (says what is needed), ``out_dir`` holds other things, ``dtype`` is unknown.
    """
    out, dtype = Path(out_dir), dtype or model.compute.param_dtype
    if dtype not in _TAGS:
        raise UserError(f"export: dtype {dtype!r} is not one of {', '.join(_TAGS)}")
    _check_replaceable(out)
    base = resolve(source, weights=False) if source is not None else None
    texts = resolve(tokenizer, weights=False) if tokenizer is not None else base
    shards = _plan(model, dtype, max_shard_bytes)
    needed = sum(size for shard in shards for _, _, size in shard)
    out.parent.mkdir(parents=True, exist_ok=True)
    if free_bytes(out.parent) < needed:
        raise _full(out, needed)
    work = out.parent / f".{out.name}.{os.getpid()}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        _write_weights(work, shards, hf_tensors(model, dtype), dtype)
        _write_texts(work, model, dtype, base, texts, entries or {}, stop_ids)
        if about is not None:
            _write_json(work / ABOUT, about)
        _swap(work, out)
    except OSError as error:
        if why_full(error):
            shutil.rmtree(work, ignore_errors=True)  # so that what is free is what the next attempt finds
            raise _full(out, needed, f"{why_full(error)}: ") from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def recover_exports(folder: Path, names: Collection[str]) -> None:
    """Undo what processes that were killed left of exports called ``names`` in ``folder``: half written ones go, a
    replaced one comes back.

    Only for names that nobody else writes there.
    """
    for left in folder.glob(".*"):
        match = _LEFT.fullmatch(left.name)
        if match is None or match[1] not in names:
            continue
        if match[2] == "old" and not (folder / match[1]).exists():
            left.rename(folder / match[1])
        else:
            shutil.rmtree(left)


Planned = tuple[str, tuple[int, ...], int]


def _plan(model: nnx.Module, dtype: str, limit: int) -> list[list[Planned]]:
    """Names, shapes and bytes by file, in table order."""
    shards: list[list[Planned]] = [[]]
    total = 0
    for row in weight_table(model.config):
        shape = row.tensor_shape(model.config)
        size = int(np.prod(shape, dtype=int)) * jnp.dtype(dtype).itemsize
        for name in row.names(model.config):
            if total and total + size > limit:
                shards.append([])
                total = 0
            shards[-1].append((name, shape, size))
            total += size
    return shards


def _write_weights(folder: Path, shards: list[list[Planned]], tensors: Iterator[tuple[str, Any]], dtype: str) -> None:
    count, weight_map = len(shards), {}
    for i, shard in enumerate(shards):
        name = SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        with open(folder / name, "wb") as file:
            _write_safetensors(file, shard, tensors, dtype)
        weight_map |= {tensor: name for tensor, _, _ in shard}
    if count > 1:
        total = sum(size for shard in shards for _, _, size in shard)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_safetensors(file: BinaryIO, shard: list[Planned], tensors: Iterator[tuple[str, Any]], dtype: str) -> None:
    """The format by hand (8-byte length, JSON header, data), so that one tensor at a time is on the host."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, size in shard:
        header[name] = {"dtype": _TAGS[dtype], "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for planned, shape, _ in shard:
        name, value = next(tensors)
        assert name == planned and value.shape == shape, (name, planned)
        file.write(np.ascontiguousarray(value).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())


def _write_texts(
    folder: Path,
    model: nnx.Module,
    dtype: str,
    base: Path | None,
    texts: Path | None,
    entries: Mapping[str, Any],
    stop_ids: Collection[int],
) -> None:
    said = read_json(base / "config.json") if base is not None and (base / "config.json").exists() else {}
    said |= entries
    kept = {key: value for key, value in said.items() if key not in _STALE}
    _write_json(folder / "config.json", {**kept, **model.config.to_hf(dtype)})
    if base is not None and (base / GENERATION).exists():
        shutil.copyfile(base / GENERATION, folder / GENERATION)
    else:
        ids = {k: said[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if said.get(k) is not None}
        _write_json(folder / GENERATION, {"_from_model_config": True, **ids})
    if stop_ids:
        settings = read_json(folder / GENERATION)
        settings.pop("_from_model_config", None)
        ends = settings.get("eos_token_id", said.get("eos_token_id"))
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        _write_json(folder / GENERATION, settings | {"eos_token_id": sorted(ends | set(stop_ids))})
    if texts is not None:
        for name in TOKENIZER_FILES:
            if (texts / name).exists():
                shutil.copyfile(texts / name, folder / name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_replaceable(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"export: {out} is a file; name a folder")
    others = _others(out.iterdir()) if out.exists() else []
    if others:
        raise UserError(f"export: {out} holds {others[0]}, which is no part of an export; name another folder")


def _others(entries: Iterable[Path]) -> list[str]:
    return sorted(p.name for p in entries if p.is_dir() or p.suffix not in _KNOWN_SUFFIXES)


def _full(out: Path, needed: int, why: str = "") -> UserError:
    survivor = f"; the earlier {out.name} is untouched" if out.exists() else ""
    return UserError(
        f"export: {why}{out} needs {size_text(needed)}, the disk has {size_text(free_bytes(out.parent))} free{survivor}"
    )


def _swap(work: Path, out: Path) -> None:
    """Put ``work`` in the place of ``out``; whatever goes wrong, one whole export stays under its name."""
    if not out.exists():
        work.rename(out)
        return
    old = work.with_suffix(".old")
    out.rename(old)
    try:
        work.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
