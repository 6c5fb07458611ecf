"""Saving and restoring a run: parameters, optimizer, step, data position and counters, together or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from kdjax.config import CheckpointConfig
from kdjax.disk import free_bytes, size_text, why_full
from kdjax.errors import UserError, first_line


class Checkpoints:
    """The checkpoints of one run folder, written asynchronously by orbax, each whole or absent.

    ``state`` is the step's pytree; ``meta`` is JSON: the data position and counters. Restoring places every array by
    the shardings of the state that is given, so the device count may change between runs. Each checkpoint carries a
    digest of every array, so that one which was cut off or altered on disk is noticed and passed over. ``read_only``
    changes nothing on disk, so it may look at a run that is going on.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, read_only: bool = False) -> None:
        self._folder, self._read_only = folder.absolute(), read_only
        self._saving = 0, 0  # step and bytes
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=True,
                read_only=read_only,
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
        """Start saving ``state`` as of ``step``; the arrays may be donated as soon as this returns.

        Raises UserError, and leaves the earlier checkpoints alone, where the state holds NaN or Inf or the disk is too
        small.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        student, rest = state["params"]["student"], state | {"params": {"extra": state["params"]["extra"]}}
        digests = {"student": _digest(student), "rest": _digest(rest)}
        if not all(finite for digest in digests.values() for _, finite in digest):
            raise UserError(
                f"step {step}: the state holds NaN or Inf and is not saved; {self.newest()}; lower train.learning_rate"
            )
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        if free_bytes(self._folder) < needed:
            raise self._full(step, needed)
        self._saving = step, needed
        meta = meta | {"digests": {name: [bits for bits, _ in d] for name, d in digests.items()}}
        with self._disk():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    student=ocp.args.StandardSave(student),
                    rest=ocp.args.StandardSave(rest),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def restore(self, like: dict[str, Any], tell: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The newest whole state, laid out like ``like``, and its ``meta``.

        Newer ones that are not whole are named through ``tell`` and moved out of the way. Raises UserError where none
        is whole.
        """
        rest = like | {"params": {"extra": like["params"]["extra"]}}
        wanted = {"student": like["params"]["student"], "rest": rest}
        step, parts, meta = self._newest_whole(wanted, tell, self.steps)
        state = dict(parts["rest"])
        return state | {"params": {"student": parts["student"], **state["params"]}}, meta

    def restore_student(self, like: Any, tell: Callable[[str], None], step: int | None = None) -> Any:
        """The student parameters alone, laid out like ``like``, of ``step`` or else of the newest whole checkpoint."""
        return self._newest_whole({"student": like}, tell, self.steps if step is None else [step])[1]["student"]

    def newest(self) -> str:
        """Which checkpoint a person can go on from, in words; waits for one that is being written."""
        self.wait()
        return self._on_disk()

    def _on_disk(self) -> str:
        whole = [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]
        if not whole:
            return "there is no checkpoint yet (checkpoint.save_every)"
        return f"the last good checkpoint is that of step {max(whole)}"

    def wait(self) -> None:
        """Until everything started is on disk. Raises UserError where the disk is full."""
        with self._disk():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._disk():
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _newest_whole(
        self, wanted: dict[str, Any], tell: Callable[[str], None], steps: Sequence[int]
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """The newest of ``steps`` whose ``wanted`` parts are as they were saved, those parts, and its meta."""
        faults: dict[int, str] = {}
        for step in sorted(steps, reverse=True):
            try:
                parts, meta = self._read(step, wanted)
            except Exception as error:  # orbax has no error of its own for a damaged folder; all are told
                faults[step] = first_line(error)
                continue
            for broken, fault in faults.items():
                tell(f"checkpoint of step {broken} is damaged ({fault}); going on from step {step}")
                if not self._read_only:
                    self._set_aside(broken)
            return step, parts, meta
        listed = "; ".join(f"step {step}: {fault}" for step, fault in faults.items()) or "none is there"
        raise UserError(f"{self._folder}: no whole checkpoint ({listed}); start anew with overwrite=true")

    def _read(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        args = {name: ocp.args.StandardRestore(_abstract(like)) for name, like in wanted.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonRestore()))
        parts, meta = {name: restored[name] for name in wanted}, restored.meta
        for name, part in parts.items():
            if [bits for bits, _ in _digest(part)] != meta["digests"][name]:
                raise ValueError(f"the arrays of {name} are not what was saved")
        return parts, meta

    def _set_aside(self, step: int) -> None:
        folder = self._folder.parent / "damaged"
        folder.mkdir(exist_ok=True)
        (self._folder / str(step)).rename(folder / f"{step}-{time.time_ns()}")
        self._manager.reload()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """What orbax raises for a full disk, in its thread or here, as a UserError about the newest save."""
        try:
            yield
        except Exception as error:  # tensorstore's words, in whatever orbax wraps them
            if why_full(error) is None:
                raise
            for left in self._folder.glob("*-tmp*"):
                shutil.rmtree(left)
            raise self._full(*self._saving, f"{why_full(error)}: ") from None

    def _full(self, step: int, needed: int, why: str = "") -> UserError:
        return UserError(
            f"checkpoint of step {step}: {why}it needs {size_text(needed)}, {self._folder} has "
            f"{size_text(free_bytes(self._folder))} free; {self._on_disk()}; free space and run the same command again"
        )


@jax.jit
def _digest_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.uint32).sum(dtype=jnp.uint32), jnp.bool_(True)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return bits.astype(jnp.uint32).sum(dtype=jnp.uint32), jnp.isfinite(x).all()


def _digest(tree: Any) -> list[tuple[int, bool]]:
    """Of each array the sum of its bit patterns modulo 2³², which no layout changes, and whether all is finite."""
    pairs = jax.device_get([_digest_one(x) for x in jax.tree.leaves(tree)])
    return [(int(bits), bool(finite)) for bits, finite in pairs]


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
