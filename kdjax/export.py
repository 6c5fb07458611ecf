"""``python -m kdjax.export RUN OUT``: a Hugging Face folder of a run's best weights, or its newest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdjax.command import guarded, which_weights


def export(
    run: str | Path, out: str | Path, dtype: str | None = None, *, step: int | None = None, best: bool = False
) -> Path:
    """Write the student of the run folder ``run`` to ``out`` as safetensors with configs and tokenizer.

    Args:
        dtype: of the stored weights; None takes ``student.export_dtype``.
        step: of which checkpoint; None takes what the run itself would export: with ``train.keep_best`` the weights of
            the best evaluation so far, else those of the newest whole checkpoint.
        best: insist on the weights of the best evaluation.
    """
    # jax is imported only once the command line holds
    from kdjax.training.saved import load_saved, run_config
    from kdjax.training.student import export_student

    config = run_config(Path(run))
    best = best or (step is None and config.train.keep_best and (Path(run) / "best").is_dir())
    return export_student(load_saved(Path(run), config, step=step, best=best), config, out, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kdjax.export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run (its `output`)")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the stored weights")
    which_weights(parser)
    asked = parser.parse_args(argv)
    return guarded(lambda: print(export(asked.run, asked.out, asked.dtype, step=asked.step, best=asked.best)))


if __name__ == "__main__":
    sys.exit(main())
