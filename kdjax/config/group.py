"""How a group of the configuration is declared: a frozen, typed dataclass whose fields carry a line of text each."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

group = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
Dtype = Literal["float32", "bfloat16"]
