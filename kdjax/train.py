"""``python -m kdjax.train --config run.yaml [key=value …]``: train a student as a configuration says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kdjax.command import guarded
from kdjax.config import Config, load_config, reference, to_yaml
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
