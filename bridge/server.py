"""`python -m bridge.server WORK WATCH FOLDER`: one engine in a process of its own, for as long as its trainer lives.

SGLang wants a process to itself: its shutdown kills every child of the calling process, it forces spawned children,
which would import the trainer's JAX again, and it changes the environment. So the trainer starts this program (see
`bridge.client`) and talks to it over two socket pairs, whose descriptors are WORK and WATCH; FOLDER is private to this
server and goes with it. Calls run one after the other on WORK, in the main thread, as SGLang's signal handlers demand;
WATCH answers `health` at any time, and its closing, like the trainer's death, ends this process and all it started.
"""

# SGLang's children start by importing this module as `__mp_main__`, before anything of SGLang: the place to mend what
# SGLang is about to import, without a file in site-packages.
from bridge.sglang_platform import mend_torchvision

mend_torchvision()

import logging  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from multiprocessing.connection import Connection, wait  # noqa: E402
from pathlib import Path  # noqa: E402

from bridge.errors import EngineError  # noqa: E402
from bridge.hidden_pool import PREFIX, SHARED, sweep  # noqa: E402
from bridge.host import Host  # noqa: E402

DYING_SECONDS = 2.0


def main() -> None:
    trainer = os.pidfd_open(os.getppid())
    work, watch = (Connection(int(descriptor)) for descriptor in sys.argv[1:3])
    for connection in (work, watch):
        os.set_inheritable(connection.fileno(), False)
    hosts: list[Host] = []
    threading.Thread(target=_watch, args=(watch, trainer, hosts), name="watch", daemon=True).start()
    spec = work.recv()
    try:
        host = Host(spec)
    except Exception as error:  # the trainer must learn of it, whatever it was
        logging.exception("the engine did not start")
        work.send(("failed", f"{type(error).__name__}: {error}"))
        end(1)
    hosts.append(host)
    work.send(("ready", own_files()))
    while True:
        method, args = work.recv()
        if method == "close":
            host.close()
            work.send(("done", None))
            end(0)
        work.send(_answer(host, method, args))


def _answer(host: Host, method: str, args: tuple) -> tuple[str, object]:
    try:
        return "done", host.call(method, args)
    except ValueError as error:
        return "misuse", str(error)
    except EngineError as error:
        return "failed", str(error)
    except Exception as error:  # a fault of the engine's own: the trainer decides what becomes of it
        logging.exception("%s failed", method)
        return "failed", f"{method}: {type(error).__name__}: {error}"


def _watch(watch: Connection, trainer: int, hosts: list[Host]) -> None:
    """answer health until the trainer is gone or hangs up"""
    while True:
        ready = wait([watch, trainer])
        if watch in ready:
            try:
                watch.recv()
                watch.send(hosts[0].health() if hosts else None)
                continue
            except (EOFError, OSError):
                wait([trainer], DYING_SECONDS)  # a dying trainer hangs up a moment before its locks are free
        end(1)


def own_files() -> list[str]:
    """files in /dev/shm, pools and weight buckets apart, that this process or a child of it has mapped"""
    files = set()
    for pid in _family():
        try:
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        files.update(line[line.index("/") :] for line in maps if f" {SHARED}/" in line)
    return sorted(file for file in files if not Path(file).name.startswith(PREFIX))


def _family() -> list[int]:
    """processes in this session, which `bridge.client` started for this server alone"""
    session, family = os.getsid(0), []
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        try:
            if os.getsid(pid) == session:
                family.append(pid)
        except ProcessLookupError:
            continue
    return family


def end(status: int) -> None:
    """leave nothing behind: children, files in shared memory, the private folder; does not return"""
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
    shutil.rmtree(sys.argv[3], ignore_errors=True)
    os._exit(status)


if __name__ == "__main__":
    main()
