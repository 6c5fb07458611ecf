"""A file of JSON lines that survives being killed: whole lines stay, a torn last one is taken back."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdjax.errors import UserError


class Journal:
    """Lines appended one by one under ``settings``, which the first line holds; locked against other processes.

    A line is on the disk when ``append`` returns. Opened again with the same settings it goes on where it stood. Other
    settings are refused, or ``replace`` the file; ``fresh`` replaces it in any case. Iterating gives the lines from the
    first on.

    Raises UserError when the settings differ, another process writes to the file, or it is not a journal.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, replace: bool = False, fresh: bool = False):
        self.path, self.lines = path, 0
        self._settings = json.loads(json.dumps(settings))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
        try:
            self._lock()
            self._open(replace, fresh)
        except BaseException:  # an interrupt too: nobody else could unlock the file
            self.close()
            raise

    def append(self, line: Mapping[str, Any]) -> None:
        """Raises UserError when the disk does not take it."""
        self._write(line)
        self.lines += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            next(file)
            for _ in range(self.lines):
                yield json.loads(next(file))

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process writes there; wait for it, or choose another file") from None

    def _open(self, replace: bool, fresh: bool) -> None:
        settings, whole = self._heal()
        if settings == self._settings and not fresh:
            self.lines = whole
            return
        if settings is not None and not (replace or fresh):
            key = next(k for k in {**settings, **self._settings} if settings.get(k) != self._settings.get(k))
            raise UserError(
                f"{self.path} was written with another {key} ({_short(settings.get(key))}, now "
                f"{_short(self._settings.get(key))}); choose another file, or set overwrite=true to start anew"
            )
        self._file.truncate(0)
        self._write({"settings": self._settings})

    def _heal(self) -> tuple[dict[str, Any] | None, int]:
        """The settings in the file and how many whole lines follow them; what a kill tore off is cut away."""
        self._file.seek(0)
        settings, count, end = None, -1, 0
        for line in self._file:
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                content = None
            if count < 0 and not line.startswith(b'{"settings": {'[: len(line)]):
                raise UserError(f"{self.path}: not a journal of answers; choose another file")
            if not isinstance(content, dict):
                if self._file.read(1):
                    raise UserError(f"{self.path}:{count + 2}: not a line of a journal; move the file away")
                self._file.truncate(end)
                break
            if count < 0:
                settings = content["settings"]
            count, end = count + 1, end + len(line)
        return settings, max(count, 0)

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); the lines before are safe") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
