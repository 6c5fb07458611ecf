"""Disks: how much is free, which errors mean that nothing is, and files that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

# No space, no quota, and the limit of a file's size: each leaves what was being written cut off.
_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def free_bytes(path: Path) -> int:
    """What a user may still write to the disk of ``path``."""
    return shutil.disk_usage(path).free


def size_text(count: int) -> str:
    """1234567 → ``1.2 MB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def why_full(error: BaseException) -> str | None:
    """The system's words if ``error``, from Python or quoted by a library, says that no more could be written."""
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return os.strerror(error.errno)
    return next((os.strerror(n) for n in _NUMBERS if os.strerror(n) in str(error)), None)


@contextmanager
def whole(path: Path, *, durable: bool = False) -> Iterator[TextIO]:
    """A text file to write: whenever the process is killed, and whatever goes wrong, the old or the new one is there.

    ``durable``: the new one is on the disk before it takes the old one's place, so that no power cut costs both.
    """
    work = path.with_name(f".{path.name}.tmp")  # one writer at a time: what a killed one left is written over
    try:
        with work.open("w", encoding="utf-8") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        work.replace(path)
    except BaseException:  # an interrupt too: half a file is not left behind
        with suppress(OSError):  # what went wrong is told, not this
            work.unlink()
        raise


def write_whole(path: Path, text: str) -> None:
    """A small file by ``whole``."""
    with whole(path) as file:
        file.write(text)
