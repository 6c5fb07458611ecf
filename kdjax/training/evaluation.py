"""Held-out numbers of a student, alone and against its teacher, and evaluation functions of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from kdjax.algorithms.base import Teacher
from kdjax.config import Config
from kdjax.data.batch import Batch
from kdjax.errors import UserError
from kdjax.losses import linear_statistics
from kdjax.registry import Registry


class Evaluator:
    """Sums ``linear_statistics`` over batches and divides once.

    Calling it returns floats over all positions that carry loss: ``ce`` (nats a token), ``accuracy`` and ``entropy``;
    with a teacher also ``kl`` (teacher ‖ student), ``rkl``, ``agreement`` (share of positions with the same most likely
    token), ``teacher_ce`` and ``teacher_entropy``.
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
                )

            return jax.tree.map(lambda x: x.sum(0), jax.lax.map(one, batch))

        self._sums = jax.jit(sums)

    def __call__(self, params: Any, batches: Iterable[Any]) -> dict[str, float]:
        totals: dict[str, float] = {}
        with jax.set_mesh(self._mesh):
            for batch in batches:
                for name, value in jax.device_get(self._sums(params, self._head, batch.arrays)).items():
                    totals[name] = totals.get(name, 0.0) + float(jnp.float32(value))
        count = totals.pop("count")
        return {name: total / count for name, total in totals.items()}


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
