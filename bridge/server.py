"""`python -m bridge.server WORK WATCH`: one engine in a process of its own, for as long as its trainer lives.

SGLang wants a process to itself: its shutdown kills every child of the calling process, it forces spawned children,
which would import the trainer's JAX again, and it changes the environment. So the trainer starts this program (see
`bridge.client`) and talks to it over two socket pairs, whose descriptors are WORK and WATCH. Calls run one after the
other on WORK, in the main thread, as SGLang's signal handlers demand; WATCH answers `health` at any time, and its
closing, like the trainer's death, ends this process and all it started.
"""

# SGLang's children start by importing this module as `__mp_main__`, before anything of SGLang: the place to mend what
# SGLang is about to import, without a file in site-packages.
from bridge.sglang_platform import mend_torchvision

mend_torchvision()

import logging  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from multiprocessing.connection import Connection, wait  # noqa: E402

from bridge.errors import EngineError, PromptError  # noqa: E402
from bridge.host import Host  # noqa: E402
from bridge.leaving import end, own_files  # noqa: E402

DYING_SECONDS = 2.0


def main() -> None:
    trainer = os.pidfd_open(os.getppid())
    work, watch = (Connection(int(descriptor)) for descriptor in sys.argv[1:3])
    for connection in (work, watch):
        os.set_inheritable(connection.fileno(), False)
    hosts: list[Host] = []
    watcher = threading.Thread(target=_watch, args=(watch, trainer, hosts), daemon=True)
    watcher.start()
    try:
        _serve(work, hosts)
    except (EOFError, ConnectionError):  # the trainer is gone: the watcher is about to end this process
        watcher.join()


def _serve(work: Connection, hosts: list[Host]) -> None:
    spec = work.recv()
    try:
        host = Host(spec)
    except Exception as error:  # whatever it was, the trainer must learn of it
        logging.exception("the engine did not start")
        work.send(("failed", f"{type(error).__name__}: {error}"))
        end(1)
    hosts.append(host)
    closing = threading.Event()
    threading.Thread(target=_mourn, args=(closing,), daemon=True).start()
    work.send(("done", (host.max_tokens, own_files())))
    while True:
        method, args = work.recv()
        if method == "close":
            closing.set()
            host.close()
            work.send(("done", None))
            end(0)
        work.send(_answer(host, method, args))


def _answer(host: Host, method: str, args: tuple) -> tuple[str, object]:
    try:
        return "done", host.call(method, args)
    except PromptError as error:
        return "prompt", str(error)
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
                watch.send(hosts[0].health())
                continue
            except (EOFError, OSError):
                wait([trainer], DYING_SECONDS)  # a dying trainer hangs up a moment before its locks are free
        end(1)


def _mourn(closing: threading.Event) -> None:
    """end when a child of the engine dies; SGLang itself would notice only at the next call"""
    children = {child.sentinel: child for child in multiprocessing.active_children()}
    while children:
        for sentinel in wait(list(children)):
            child = children.pop(sentinel)
            child.join()
            if child.exitcode and not closing.is_set():
                logging.error("%s (pid %d) died, exit code %d", child.name, child.pid, child.exitcode)
                end(1)


if __name__ == "__main__":
    main()
