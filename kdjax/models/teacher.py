"""The output head of a teacher, of whatever family: the one tensor that turns its hidden rows into logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax.errors import UserError
from kdjax.folders import resolve
from kdjax.head import Head
from kdjax.models.checkpoint import files_of, open_tensors, placed, tensor_of
from kdjax.models.config import read_json
from kdjax.sharding import Rules

# A vision-language or wrapped model puts its text decoder behind a prefix.
_PREFIXES = ("", "language_model.", "model.language_model.", "model.")
_TABLES = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight")


@dataclass(frozen=True)
class TeacherShape:
    """What a run needs to know of a teacher besides its head."""

    hidden_size: int
    vocab_size: int
    max_position_embeddings: int | None


def teacher_shape(path: str | Path) -> TeacherShape:
    """What config.json of a folder or hub id says. Raises UserError where it is no language model's."""
    file = resolve(path, weights=False) / "config.json"
    text = _text(read_json(file))
    try:
        return TeacherShape(text["hidden_size"], text["vocab_size"], text.get("max_position_embeddings"))
    except KeyError as error:
        raise UserError(f"{file}: {error.args[0]} is missing; is it a language model?") from None


def teacher_head(
    path: str | Path, mesh: Mesh | None = None, rules: Rules | None = None, dtype: str | None = None
) -> Head:
    """Read ``lm_head`` (or the embedding, where they are tied) and nothing else of the model in ``path``.

    Soft-cap (Gemma 2), scale (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``) and bias come along. The
    family does not matter: the preflight compares the outcome with the engine before anything is trained on it.

    Args:
        path: Hugging Face folder or hub id with safetensors.
        mesh: ``tensor`` splits the vocabulary and ``fsdp`` the width; each device reads its own part.
        dtype: of the head; None keeps the file's.

    Returns the head in Hugging Face's layout [V, E]. Raises UserError where there is no such tensor, where it is
    quantised, or where its shape is not config.json's.
    """
    folder, shape = resolve(path), teacher_shape(path)
    text, files = _text(read_json(folder / "config.json")), _files(folder)
    name = _find(files, folder, bool(text.get("tie_word_embeddings", False)))
    wanted = (shape.vocab_size, shape.hidden_size)
    weight = _read(folder, files[name], name, wanted, mesh, rules or Rules(), dtype)
    bias_name = name.removesuffix("weight") + "bias"
    bias = None
    if name.endswith("lm_head.weight") and bias_name in files:
        bias = _read(folder, files[bias_name], bias_name, wanted[:1], mesh, rules or Rules(), dtype)
    return Head(weight, bias, text.get("final_logit_softcapping"), _scale(text), layout="vd")


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the text decoder."""
    return {**config, **(config.get("text_config") or {})}


def _files(folder: Path) -> dict[str, str]:
    """Tensor name → file."""
    files, where = files_of(folder)
    if where is not None:
        return where
    (file,) = files
    with open_tensors(folder / file) as handle:
        return dict.fromkeys(handle.keys(), file)


def _find(files: Mapping[str, str], folder: Path, tied: bool) -> str:
    heads = [prefix + "lm_head.weight" for prefix in _PREFIXES]
    tables = [prefix + table for prefix in _PREFIXES for table in _TABLES]
    for name in [*tables, *heads] if tied else heads:
        if name in files:
            return name
    what = "tied embedding" if tied else "lm_head.weight"
    raise UserError(f"{folder}: no {what} among its tensors; the teacher's logits cannot be recomputed without it")


def _scale(text: Mapping[str, Any]) -> float:
    if text.get("logits_scaling"):
        return 1.0 / float(text["logits_scaling"])
    return float(text.get("logit_scale") or 1.0)


def _read(
    folder: Path, file: str, name: str, wanted: tuple[int, ...], mesh: Mesh | None, rules: Rules, dtype: str | None
) -> jax.Array:
    with open_tensors(folder / file) as handle:
        view, entry = tensor_of(handle, folder, file, name)
        if entry.shape != wanted:
            raise UserError(f"{folder / file}: {name} is {entry.shape}, config.json says {wanted}")
        where = None if mesh is None else rules.sharding(mesh, ("vocab", "embed")[: len(wanted)], wanted)
        return placed(wanted, where, lambda index: np.array(view[index], dtype=jnp.dtype(dtype) if dtype else None))
