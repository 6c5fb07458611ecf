"""``python -m kdjax.evaluate``: held-out numbers of a student, alone, against a teacher, and by functions of one's own.

    python -m kdjax.evaluate --run runs/my_run [--step N | --best]      # a run's export, a checkpoint, its best weights
    python -m kdjax.evaluate --config run.yaml --model FOLDER           # any Hugging Face folder or hub id
    python -m kdjax.evaluate --run runs/my_run --task gsm8k             # its answers to data.eval, scored by a reward

The configuration, the run's own or FILE, says data, teacher, mesh and functions (``train.eval_functions``) as for
training.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdjax.command import guarded, which_weights
from kdjax.config import Config, load_config
from kdjax.errors import UserError


def evaluate(
    config: Config,
    model: str | Path | None = None,
    *,
    run: str | Path | None = None,
    step: int | None = None,
    best: bool = False,
) -> dict[str, float]:
    """CE, perplexity and accuracy on ``data.eval``; with a teacher, KL, agreement and so on; then the functions.

    Args:
        model: a Hugging Face folder or hub id; None takes the weights of ``run``.
        run: a run folder, whose checkpoint of ``step``, best weights or (neither given) newest checkpoint is taken.

    Raises UserError for what the configuration can mend.
    """
    # jax is imported only once the configuration holds
    from flax import nnx

    from kdjax.training.compiled import keep_compiled
    from kdjax.training.evaluation import Evaluation, Evaluator, call_evaluations, check_evaluations
    from kdjax.training.preflight import check_teacher
    from kdjax.training.saved import load_saved
    from kdjax.training.sources import Stream
    from kdjax.training.student import make_student

    if not config.data.eval:
        raise UserError("data.eval is empty: name the held-out rows, as in data.eval=[{path: rows.jsonl}]")
    check_evaluations(config.train.eval_functions)
    if model is not None:
        own = replace(config.student, path=str(model), init="pretrained", config={}, layers=())
        config = replace(config, student=own)
    keep_compiled(config.train.compilation_cache, lambda line: print(line, file=sys.stderr))
    with Stream(config, log=Path(config.output) / "evaluate.log") as stream:
        if model is not None:
            student = make_student(config, stream.mesh)
        else:
            student = load_saved(Path(run or config.output), config, step=step, best=best, mesh=stream.mesh)
        stream.wait_ready()
        if stream.teachers and config.teacher.preflight:
            check_teacher(stream)
        batches = stream.evaluation()
        values = Evaluator(student, stream.teachers, stream.mesh)(nnx.state(student, nnx.Param), batches)
        values["perplexity"] = math.exp(values["ce"])
        about = Evaluation(student, batches, stream.teachers, stream.tokenizer, stream.mesh, config, step, values)
        return values | call_evaluations(config.train.eval_functions, about)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kdjax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="RUN", help="folder of a run (its `output`)")
    what.add_argument("--config", metavar="FILE", help="configuration of a run")
    parser.add_argument("--model", metavar="FOLDER", help="what to evaluate (default: the run's export)")
    which_weights(parser)
    parser.add_argument("--task", metavar="REWARD", help="score answers: gsm8k, exact_match, format or my.py:function")
    parser.add_argument("--out", metavar="FILE", help="with --task: where the answers go (default: OUTPUT/answers/…)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace single values")
    asked = parser.parse_args(argv)
    saved = asked.step is not None or asked.best
    if saved and asked.model:
        parser.error("--step and --best choose weights of a run, --model another folder: give one of them")
    if asked.task and asked.step is not None:
        parser.error("--task asks an engine, which needs a folder: export the step first and name it by --model")

    def command() -> None:
        from kdjax.training.saved import run_config

        by_run = asked.run is not None
        config = run_config(Path(asked.run), asked.overrides) if by_run else load_config(asked.config, asked.overrides)
        run = asked.run or config.output
        model = asked.model or f"{run}/{'best' if asked.best else 'export'}"
        if asked.task is None:
            values = evaluate(config, None if saved else model, run=run, step=asked.step, best=asked.best)
        else:
            from kdjax.generation.tasks import evaluate_task

            values = evaluate_task(config, model, asked.task, asked.out)
        print(json.dumps(values, indent=2))

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
