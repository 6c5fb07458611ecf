"""Held-out numbers of a student, alone and against its teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from kdjax.data.batch import Batch
from kdjax.losses import linear_statistics


class Evaluator:
    """Sums ``linear_statistics`` over batches and divides once.

    Calling it returns floats: ``ce`` (nats a token), ``accuracy`` and, with a teacher, ``kl`` (teacher ‖ student),
    ``agreement`` (share of positions with the same most likely token) and ``teacher_ce``.
    """

    def __init__(self, model: nnx.Module, teachers: tuple[Any, ...], mesh: Mesh) -> None:
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
