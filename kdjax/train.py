"""``python -m kdjax.train --config run.yaml [key=value …]``: train a student as a configuration says."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bridge.errors import EngineError
from kdjax.config import Config, load_config, reference, to_yaml
from kdjax.disk import why_full
from kdjax.errors import UserError
from kdjax.quiet import quiet
from kdjax.wording import as_yaml, kind_in_words

PROFILED = 5  # steps: enough to tell a habit from an accident, and a trace that a browser opens


def parse(argv: Sequence[str] | None = None) -> Config | None:
    """Read the command line; None when ``--print-config`` only asked to see the result."""
    parser = argparse.ArgumentParser(
        prog="python -m kdjax.train",
        description="Train a student: distillation from a teacher, or supervised fine-tuning without one.",
        epilog=_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the groups listed below")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and leave")
    parser.add_argument("--profile", action="store_true", help=f"trace a few steps: short for log.profile={PROFILED}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values, as in train.steps=100")
    arguments = parser.parse_args(argv)
    traced = [f"log.profile={PROFILED}"] * arguments.profile
    config = load_config(arguments.config, [*traced, *arguments.overrides])
    if arguments.print_config:
        print(to_yaml(config), end="")
        return None
    return config


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


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> None:
        config = parse(argv)
        if config is not None:
            from kdjax.training.loop import train  # jax is imported only once the configuration holds

            train(config)

    return guarded(command)


def _keys() -> str:
    lines = ["configuration keys, their defaults as YAML, what they take and mean:"]
    for name, kind, default, meaning in reference():
        lines.append(f"  {name}: {as_yaml(default)}  ({kind_in_words(kind)})\n      {meaning}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
