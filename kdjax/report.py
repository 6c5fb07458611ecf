"""``python -m kdjax.report RUN …``: the page and the figures of a run, finished or not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kdjax.command import guarded


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kdjax.report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run (its `output`)")
    arguments = parser.parse_args(argv)

    def command() -> None:
        from kdjax.reporting import write_report  # plots load for seconds

        for run in arguments.runs:
            print(write_report(run))

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
