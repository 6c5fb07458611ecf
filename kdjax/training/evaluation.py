"""Held-out numbers of a student, alone and against its teacher, and evaluation functions of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from kdjax.algorithms.base import Teacher
from kdjax.config import Config
from kdjax.data.batch import Batch
from kdjax.errors import UserError
from kdjax.losses import linear_statistics
from kdjax.registry import Registry

POSITIONS = (0, 16, 64, 256, 1024, 4096)
"""Where the buckets of positions begin; the last has no end."""


class Evaluator:
    """Sums ``linear_statistics`` over batches and divides once.

    Calling it returns floats over all positions that carry loss: ``ce`` (nats a token), ``accuracy`` and ``entropy``;
    with a teacher also ``kl`` (teacher ‖ student), ``rkl``, ``agreement`` (share of positions with the same most likely
    token), ``teacher_ce`` and ``teacher_entropy``, and ``kl_at/0-15``, ``kl_at/16-63`` …: the same ``kl`` over the
    first sixteen positions of each response, the next forty-eight, and so on, as far as there are any.
    """

    def __init__(self, model: nnx.Module, teachers: tuple[Teacher, ...], mesh: Mesh) -> None:
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        self._mesh = mesh
        self._head = teachers[0].head if teachers else None

        def sums(params: Any, head: Any, batch: Batch) -> dict[str, jax.Array]:
            student = nnx.merge(graph, params, rest)

            def one(micro: Batch) -> dict[str, jax.Array]:
                hidden = micro.gather(student(micro.tokens, micro.positions, micro.segment_ids))
                teacher_hidden = micro.teacher_hidden[0] if micro.teacher_hidden else None
                return linear_statistics(
                    hidden,
                    student.head(),
                    teacher_hidden,
                    None if teacher_hidden is None else head,
                    labels=micro.labels,
                    mask=micro.mask,
                    groups=jnp.digitize(response_positions(micro), jnp.array(POSITIONS)) - 1,
                    group_count=len(POSITIONS),
                )

            return jax.tree.map(lambda x: x.sum(0), jax.lax.map(one, batch))

        self._sums = jax.jit(sums)

    def __call__(self, params: Any, batches: Iterable[Any]) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        with jax.set_mesh(self._mesh):
            for batch in batches:
                for name, value in jax.device_get(self._sums(params, self._head, batch.arrays)).items():
                    totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
        counts = totals.pop("count")
        values = {name: float(by_bucket.sum() / counts.sum()) for name, by_bucket in totals.items()}
        if "kl" in totals:
            buckets = zip(_bucket_names(), totals["kl"], counts, strict=True)
            values |= {f"kl_at/{name}": float(kl / count) for name, kl, count in buckets if count}
        return values


def response_positions(batch: Batch) -> Int32[Array, " {batch.rows.size}"]:
    """How many loss rows of its own document stand before each loss row: 0 for a response's first token.

    Padding entries hold anything. ``batch`` is one micro-batch.
    """
    shards, count = batch.rows.shape
    # A document's loss rows lie side by side, so a document begins where its row or its segment changes.
    begins = jnp.ones((shards, count), bool)
    changed = jnp.diff(batch.rows // batch.tokens.shape[-1], axis=1) != 0
    if batch.segment_ids is not None:
        segments = jnp.take_along_axis(batch.segment_ids.reshape(shards, -1), batch.rows, axis=1)
        changed |= jnp.diff(segments, axis=1) != 0
    begins = begins.at[:, 1:].set(changed)
    places = jnp.arange(count, dtype=jnp.int32)
    return (places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)).reshape(-1)


def _bucket_names() -> list[str]:
    return [f"{a}-{b - 1}" for a, b in zip(POSITIONS, POSITIONS[1:], strict=False)] + [f"{POSITIONS[-1]}+"]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation function is given."""

    model: nnx.Module
    """The student with the weights of ``step``: ``model(tokens, positions, segment_ids)`` → [B, S, D]."""
    batches: Sequence[Any]
    """The held-out rows as ``DeviceBatch``es, with the teacher's hidden rows; ``batch.host.documents`` has the ids."""
    teachers: tuple[Teacher, ...]
    tokenizer: Any
    mesh: Mesh
    """Ambient while the function runs."""
    config: Config
    step: int | None
    """Of the weights; None where they come from a folder or are the newest or best of a run."""
    values: Mapping[str, float]
    """The built-in numbers of this evaluation."""


_REGISTRY = Registry("evaluation function", "train.eval_functions")
register_evaluation: Callable[[str], Callable[[Callable], Callable]] = _REGISTRY.register
"""A decorator that makes ``fn(evaluation: Evaluation) -> float | dict[str, float]`` known under a name."""


def check_evaluations(names: Iterable[str]) -> None:
    """Refuse an unknown evaluation function before anything is loaded. Raises UserError, with the known names."""
    for name in names:
        _REGISTRY.get(name)


def call_evaluations(names: Iterable[str], evaluation: Evaluation) -> dict[str, float]:
    """Numbers of the functions called ``names``: ``name`` for a single one, ``name/key`` for a mapping.

    Raises UserError when a function returns something else.
    """
    found: dict[str, float] = {}
    with jax.set_mesh(evaluation.mesh):
        for name in names:
            short, result = name.rpartition(":")[2], _REGISTRY.get(name)(evaluation)
            parts = {f"{short}/{k}": v for k, v in result.items()} if isinstance(result, Mapping) else {short: result}
            try:
                found |= {key: float(value) for key, value in parts.items()}
            except (TypeError, ValueError):
                raise UserError(
                    f"train.eval_functions: {name} must return a number or a mapping of numbers, "
                    f"it returned {type(result).__name__}"
                ) from None
    return found
