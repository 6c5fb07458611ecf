"""what the data tests share: small documents, tokenizers with a family's special tokens, and configurations."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from kdjax.config import DataConfig, SourceConfig
from kdjax.data import Document, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "templates"
GSM8K = {"prompt_key": "question", "response_key": "answer"}

FAMILIES = {
    "qwen2.5": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<end_of_turn>"},
}
EXTRA = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>"],
    "gemma": ["<start_of_turn>"],
}


@cache
def family(name: str):
    """The examples' tokenizer with the special tokens and the chat template of a model family."""
    tokenizer = load_tokenizer(ROOT / "examples" / "tokenizer")
    tokenizer.add_special_tokens(FAMILIES[name] | {"extra_special_tokens": EXTRA.get(name, [])})
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


@cache
def plain():
    """The examples' tokenizer as it is; its template has generation markers."""
    return load_tokenizer(ROOT / "examples" / "tokenizer")


def document(ids, loss, source="made:1", **teacher) -> Document:
    return Document(np.asarray(ids, np.int32), np.asarray(loss, bool), source, **teacher)


def drawn(rng: np.random.Generator, length: int, source: str = "drawn") -> Document:
    """Random ids behind a prompt of random length; at least one loss token."""
    ids = rng.integers(3, 4096, length).astype(np.int32)
    return Document(ids, np.arange(length) >= rng.integers(1, length), source)


def config(*sources, **settings) -> DataConfig:
    sources = tuple(s if isinstance(s, SourceConfig) else SourceConfig(path=str(s)) for s in sources)
    return DataConfig(train=sources, **{"max_len": 64, "packing_bins": 4, **settings})


def write_pairs(path: Path, count: int, words=lambda i: 3 + i % 7, tag: str = "") -> Path:
    """A jsonl file of prompt/response rows; row i's response names the row."""
    rows = ({"prompt": f"{tag}say {i}", "response": f"{tag}{i} " + "so " * words(i)} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
