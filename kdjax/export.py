"""``python -m kdjax.export RUN OUT``: a Hugging Face folder from the newest checkpoint of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdjax.config import load_config
from kdjax.errors import UserError
from kdjax.train import guarded


def export(run: str | Path, out: str | Path, dtype: str | None = None) -> Path:
    """Write the newest checkpoint of the run folder ``run`` to ``out`` as safetensors with configs and tokenizer."""
    from flax import nnx  # jax is imported only once the run is known to be there

    from kdjax.models import export_hf
    from kdjax.training.checkpoint import Checkpoints
    from kdjax.training.student import make_student, tokenizer_path

    run = Path(run)
    config = load_config(run / "config.yaml")
    checkpoints = Checkpoints(run / "checkpoints", config.checkpoint)
    if checkpoints.latest is None:
        raise UserError(f"{run}/checkpoints holds no checkpoint; train first, or set checkpoint.save_every")
    # Only the shapes are wanted: random weights are drawn rather than others read, and replaced at once.
    kept = {"num_hidden_layers": len(config.student.layers)} if config.student.layers else {}
    shape = replace(config.student, path=config.student.path or config.teacher.path, init="random", layers=())
    model = make_student(replace(config, student=replace(shape, config={**config.student.config, **kept})))
    params = checkpoints.restore_student(nnx.state(model, nnx.Param))
    checkpoints.close()
    nnx.update(model, params)
    return export_hf(
        model,
        out,
        source=config.student.path or config.teacher.path,
        tokenizer=tokenizer_path(config),
        dtype=dtype or config.student.export_dtype,
        entries={k: v for k, v in config.student.config.items() if k.endswith("_token_id")},
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kdjax.export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run (its `output`)")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the stored weights")
    arguments = parser.parse_args(argv)
    return guarded(lambda: print(export(arguments.run, arguments.out, arguments.dtype)))


if __name__ == "__main__":
    sys.exit(main())
