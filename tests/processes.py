"""Which processes belong to an engine, and which are no more; jax is not loaded here."""

from __future__ import annotations

import os
from pathlib import Path


def family(session: int) -> list[int]:
    """the processes of a server: it leads a session of its own"""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == session:
                pids.append(int(entry.name))
        except ProcessLookupError:
            continue
    return pids


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def schedulers(server: int) -> list[int]:
    """SGLang's schedulers below ``server``: its children but Python's tracker; not every process can have a title"""
    said = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family(server) if pid != server}
    return [pid for pid, words in said.items() if b"resource_tracker" not in words]
