"""Types and defaults of configuration keys as a person writes and reads them: for ``--help`` and the reference page."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_NAMES = {
    "str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Any": "any", "None": "null",
}  # fmt: skip


def kind_in_words(kind: str) -> str:
    """A type as ``kdjax.config.reference`` spells it: ``tuple[int, ...]`` is a list of whole numbers."""
    kind = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", kind)
    kind = re.sub(r"Literal\[([^]]*)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), kind)
    words = []
    for part in kind.split(" | "):
        if many := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", part):
            words.append(f"list of {_NAMES.get(many[1], many[1])}s")
        elif pair := re.fullmatch(r"tuple\[(\w+), \w+\]", part):
            words.append(f"pair of {_NAMES.get(pair[1], pair[1])}s")
        elif part.startswith("dict["):
            words.append("mapping")
        else:
            words.append(_NAMES.get(part, part if part == "list" else f"`{part}`"))
    return " or ".join(words) if len(words) < 3 else ", ".join(words)


def as_yaml(default: Any) -> str:
    """A default on one line of YAML; ``required`` stays a word."""
    plain = list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(plain, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()
