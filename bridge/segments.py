"""Files in /dev/shm that processes share: made, mapped, and removed with their owner, however that ends.

The owner holds a lock on the file for as long as it lives, so what a killed process left behind is told apart from what
is in use, in other containers too.
"""

import fcntl
import mmap
import os
import secrets
import weakref
from pathlib import Path

from bridge.errors import EngineError

SHARED = Path("/dev/shm")
PREFIX = "kdjax-"


def create_segment(kind: str, size: int, what: str, less: str) -> tuple[str, int]:
    """a new zeroed file of `size` bytes in /dev/shm, really allocated and locked: its path and its open descriptor

    `kind` is a part of its name, `what` what it holds in words, and `less` what to do for a smaller one.
    Raises EngineError where /dev/shm is too small: a page that cannot be had would otherwise kill by SIGBUS later.
    """
    while True:
        path = str(SHARED / f"{PREFIX}{kind}-{os.getpid()}-{secrets.token_hex(6)}")
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else another process swept it away before it was locked
            break
        os.close(descriptor)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        remove_segment(path, descriptor)
        space = os.statvfs(SHARED)
        raise EngineError(
            f"{size / 2**30:.2f} GiB of {what} do not fit into {SHARED} "
            f"({space.f_bavail * space.f_frsize / 2**30:.2f} GiB free): {less}, or use a larger {SHARED} "
            f"(docker run --shm-size)"
        ) from error
    return path, descriptor


def map_segment(path: str, size: int) -> mmap.mmap:
    """another process's segment, for reading and writing, for as long as anything refers to the result"""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def removed_with(owner: object, path: str, descriptor: int) -> weakref.finalize:
    """what removes a segment when called, or else when `owner` goes; in this process alone: a fork that exits must not

    Whoever has the segment mapped keeps the memory.
    """
    return weakref.finalize(owner, _remove_if_owner, os.getpid(), path, descriptor)


def remove_segment(path: str, descriptor: int) -> None:
    """unlink a segment and let go of its lock"""
    Path(path).unlink(missing_ok=True)
    os.close(descriptor)


def sweep() -> list[str]:
    """remove segments whose owner is gone; returns their paths"""
    swept = []
    for path in SHARED.glob(f"{PREFIX}*"):
        if path.is_dir():  # where TMPDIR is shared memory, an engine's folder
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            swept.append(str(path))
        except BlockingIOError:  # its owner lives
            pass
        finally:
            os.close(descriptor)
    return swept


def _remove_if_owner(owner: int, path: str, descriptor: int) -> None:
    if os.getpid() == owner:
        remove_segment(path, descriptor)
