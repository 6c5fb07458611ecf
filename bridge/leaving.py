"""How a server process goes: its children, its files in shared memory and its private folder go with it."""

import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import NoReturn

from bridge.segments import PREFIX, SHARED, sweep

FOLDER_PREFIX = "kdjax-engine-"  # of the temporary folder that `bridge.client` makes for one server

_known: set[str] = set()


def own_files() -> list[str]:
    """files in /dev/shm that this process or a child of it has or had mapped, pools and weight buckets apart

    SGLang leaves some behind (its load snapshots, multiprocessing's semaphores) since it kills its own processes. A
    semaphore is mapped under a name it no longer has, so files are told by their inodes.
    """
    mapped = set()
    for pid in _family():
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        mapped.update(int(line.split()[4]) for line in lines if f" {SHARED}/" in line)
    with os.scandir(SHARED) as files:
        _known.update(file.path for file in files if file.inode() in mapped and not file.name.startswith(PREFIX))
    return sorted(_known)


def end(status: int) -> NoReturn:
    """end this process and its children, leaving nothing behind"""
    files = own_files()
    for pid in _family():
        if pid != os.getpid():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    for file in files:
        Path(file).unlink(missing_ok=True)
    sweep()  # the pool of a trainer that was killed
    folder = Path(tempfile.gettempdir())
    if folder.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(status)


def child_failed(signum: int, frame: object) -> NoReturn:
    """SGLang's handler for the signal that a child sends when it cannot go on; the child has logged why"""
    end(1)


def _family() -> list[int]:
    """processes in this session, which `bridge.client` started for this server alone"""
    session, family = os.getsid(0), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                family.append(int(process.name))
        except ProcessLookupError:
            continue
    return family
