"""What a HF model folder says about its model, read from JSON and safetensors' headers: no framework is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class Facts:
    """width: of a hidden row. vocab: rows of the embedding. tensors: every stored name and its shape. tied: the head is
    the embedding. eos_ids: what ends a text by config.json and generation_config.json. dtype: as stored."""

    width: int
    vocab: int
    dtype: str
    tied: bool
    eos_ids: frozenset[int]
    tensors: dict[str, tuple[int, ...]]


def read_facts(folder: Path) -> Facts:
    """raises ValueError where config.json is missing or says too little, or a safetensors file is not whole"""
    config = _json(folder / "config.json")
    if not config:
        raise ValueError(f"{folder} has no config.json: it is not a HF model folder")
    text = config.get("text_config", config)
    absent = [key for key in ("hidden_size", "vocab_size") if key not in text]
    if absent:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(absent)}")
    eos_ids = set()
    for source in (config, text, _json(folder / "generation_config.json")):
        value = source.get("eos_token_id")
        eos_ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return Facts(
        width=text["hidden_size"],
        vocab=text["vocab_size"],
        dtype=config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32",
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        eos_ids=frozenset(eos_ids),
        tensors={name: shape for file in sorted(folder.glob("*.safetensors")) for name, shape in _shapes(file).items()},
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """of every tensor in a safetensors file, by name"""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut-off safetensors file ({error}); fetch it again") from None
