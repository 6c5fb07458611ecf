"""Things that a configuration names: registered under a word, or written in a user's file as ``path/my.py:name``."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdjax.errors import UserError


class Registry:
    """Name → object, with one clear line for a name that is not there.

    Args:
        kind: what is registered, for messages ("divergence").
        key: the configuration key that names one ("distill.loss").
    """

    def __init__(self, kind: str, key: str) -> None:
        self.kind, self.key = kind, key
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """A decorator that registers its object as ``name``; raises ValueError when another object has the name."""

        def add(entry: Any) -> Any:
            known = self._entries.setdefault(name, entry)
            if known is not entry and _origin(known) != _origin(entry):
                raise ValueError(f"{self.kind} {name!r} is already registered by {_origin(known)}; choose another name")
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        return sorted(self._entries)

    def get(self, name: str) -> Any:
        """The object registered as ``name`` or written as ``file.py:attribute``. Raises UserError."""
        if name in self._entries:
            return self._entries[name]
        file, colon, attribute = name.rpartition(":")
        if colon and file.endswith(".py"):
            return self._from_file(Path(file), attribute)
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"{self.key}: no {self.kind} {name!r}; {hint}known: {', '.join(self.names())}, or a file as my.py:name"
        )

    def _from_file(self, file: Path, attribute: str) -> Any:
        if not file.is_file():
            raise UserError(f"{self.key}: {file} is not a file; give a path that exists, relative to where you start")
        module_name = f"kdjax_user_{file.resolve().stem}_{abs(hash(file.resolve()))}"
        module = sys.modules.get(module_name)
        if module is None:
            spec = importlib.util.spec_from_file_location(module_name, file)
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:  # whatever the user's file raised: half a module is not kept
                del sys.modules[module_name]
                raise
        if not hasattr(module, attribute):
            public = [n for n in vars(module) if not n.startswith("_")]
            raise UserError(f"{self.key}: {file} has no {attribute!r}; it defines {', '.join(public) or 'nothing'}")
        return getattr(module, attribute)


def _origin(entry: Any) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', entry)}"
