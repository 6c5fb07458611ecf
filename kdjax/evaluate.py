"""``python -m kdjax.evaluate --config run.yaml [--model FOLDER] [--task REWARD]``: held-out numbers of a model.

The configuration says data, teacher and mesh as for training; ``--model`` is any Hugging Face folder or hub id, by
default the run's own export. With ``--task`` the model answers the held-out prompts and a reward scores the answers;
without, its probabilities are measured, alone and against the teacher.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdjax.config import Config, load_config
from kdjax.errors import UserError
from kdjax.train import guarded


def evaluate(config: Config, model: str | Path) -> dict[str, float]:
    """CE, perplexity and accuracy of ``model`` on ``data.eval``; with a teacher, KL and agreement too."""
    from flax import nnx  # jax is imported only once the configuration holds

    from kdjax.models import load_model
    from kdjax.training.evaluation import Evaluator
    from kdjax.training.preflight import check_teacher
    from kdjax.training.sources import Stream

    if not config.data.eval:
        raise UserError("data.eval is empty: name the held-out rows, as in data.eval=[{path: rows.jsonl}]")
    config = replace(config, student=replace(config.student, path=str(model), init="pretrained", config={}, layers=()))
    with Stream(config) as stream:
        student = load_model(model, mesh=stream.mesh, dtype=config.student.dtype)
        evaluator = Evaluator(student, stream.teachers, stream.mesh)
        stream.wait_ready()
        if stream.teachers and config.teacher.preflight:
            check_teacher(stream)
        values = evaluator(nnx.state(student, nnx.Param), stream.evaluation())
    return values | {"perplexity": math.exp(values["ce"])}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kdjax.evaluate", description=__doc__)
    parser.add_argument("--config", metavar="FILE", required=True, help="configuration of the run")
    parser.add_argument("--model", metavar="FOLDER", help="what to evaluate (default: OUTPUT/export)")
    parser.add_argument("--task", metavar="REWARD", help="score answers: gsm8k, exact_match, format or my.py:function")
    parser.add_argument("--out", metavar="FILE", help="with --task: where the answers go (default: OUTPUT/answers/…)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace single values")
    arguments = parser.parse_args(argv)

    def command() -> None:
        config = load_config(arguments.config, arguments.overrides)
        model = arguments.model or f"{config.output}/export"
        if arguments.task is None:
            values = evaluate(config, model)
        else:
            from kdjax.tasks import evaluate_task

            values = evaluate_task(config, model, arguments.task, arguments.out)
        print(json.dumps(values, indent=2))

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
