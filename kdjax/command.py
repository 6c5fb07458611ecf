"""What the commands share: how they answer a fault or a signal, and the options that several of them take."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bridge.errors import EngineError
from kdjax.disk import why_full
from kdjax.errors import UserError
from kdjax.quiet import quiet


def guarded(command: Callable[[], None]) -> int:
    """Run a command; what a person can mend becomes one line on standard error and exit code 2."""
    try:
        with quiet(), _sigterm_as_ctrl_c():
            command()
    except (UserError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if why_full(error) is None:
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}; free space and try again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


def which_weights(parser: argparse.ArgumentParser) -> None:
    """Add ``--step`` and ``--best``, of which one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--step", type=int, metavar="N", help="the checkpoint of step N")
    group.add_argument("--best", action="store_true", help="the weights of the best evaluation (train.keep_best)")


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Where a command does not say otherwise, SIGTERM unwinds it as a Ctrl-C does, so that its engines end with it."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere signals cannot be caught
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
