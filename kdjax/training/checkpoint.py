"""Saving and restoring a run: parameters, optimizer, step, data position and counters, together or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kdjax.config import CheckpointConfig, Config, to_dict
from kdjax.errors import UserError

# What may differ between the run that saved and the run that goes on: where things go, not what is computed.
_ENGINE = ("engine", "tp", "pp", "ep", "mem_fraction", "args", "threads", "lookahead", "start_timeout", "timeout")
_FREE = {
    *("output", "overwrite", "log", "checkpoint", "mesh", "generate", "data.workers"),
    *(f"train.{key}" for key in ("eval_every", "eval_rows", "eval_functions")),
    *(f"teacher.{key}" for key in (*_ENGINE, "preflight")),
}


class Checkpoints:
    """The checkpoints of one run folder, written asynchronously by orbax, each whole or absent.

    ``state`` is the step's pytree; ``meta`` is JSON: the data position and counters. Restoring places every array by
    the shardings of the state that is given, so the device count may change between runs.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
        )

    @property
    def latest(self) -> int | None:
        """The newest saved step."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All saved steps, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Start saving ``state`` as of ``step``; the arrays may be donated as soon as this returns."""
        if step in self._manager.all_steps():
            return
        student, rest = state["params"]["student"], state | {"params": {"extra": state["params"]["extra"]}}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                student=ocp.args.StandardSave(student), rest=ocp.args.StandardSave(rest), meta=ocp.args.JsonSave(meta)
            ),
        )

    def restore(self, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The newest state, laid out like ``like``, and its ``meta``."""
        rest = like | {"params": {"extra": like["params"]["extra"]}}
        restored = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                student=ocp.args.StandardRestore(_abstract(like["params"]["student"])),
                rest=ocp.args.StandardRestore(_abstract(rest)),
                meta=ocp.args.JsonRestore(),
            ),
        )
        state = dict(restored.rest)
        return state | {"params": {"student": restored.student, **state["params"]}}, restored.meta

    def restore_student(self, like: Any, step: int | None = None) -> Any:
        """The student parameters alone of ``step``, by default the newest, laid out like ``like``."""
        args = ocp.args.Composite(student=ocp.args.StandardRestore(_abstract(like)))
        return self._manager.restore(self.latest if step is None else step, args=args).student

    def wait(self) -> None:
        """Until everything started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def refuse_other_config(saved: dict[str, Any], config: Config) -> None:
    """Raise UserError when a checkpoint was written by a configuration that computes something else."""
    differing = sorted(_differences(saved, to_dict(config)))
    if differing:
        raise UserError(
            f"{config.output} holds a checkpoint of another configuration (differs in {', '.join(differing)}); "
            "restore those values, choose another output, or start anew with overwrite=true"
        )


def _differences(a: Any, b: Any, prefix: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {*a, *b} if f"{prefix}{k}" not in _FREE]
        return {d for k in keys for d in _differences(a.get(k), b.get(k), f"{prefix}{k}.")}
    return set() if a == b else {prefix.rstrip(".")}
