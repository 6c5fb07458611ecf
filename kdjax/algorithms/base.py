"""What an algorithm is: it compares student and teacher on a batch and returns named terms.

An algorithm is an ``nnx.Module`` built as ``Algorithm(student, teachers, config, rngs=rngs)`` and called as
``algorithm(student, batch) -> dict[str, Term]``. It may own ``nnx.Param``s (projectors); they are trained with the
student. Arrays that it only reads, a teacher's head for instance, belong into ``Frozen``. A class that names in
``arguments``, a tuple of words, what it takes of ``distill.algorithm_args``, has others refused before anything loads;
one with ``rollouts = False`` cannot learn from what the student writes, and is refused in a run that samples it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.head import Head
from kdjax.losses import find_divergence
from kdjax.registry import Registry


class Term(NamedTuple):
    """One part of the loss as a sum over positions.

    The step divides ``sum`` by the ``count`` of the whole global batch, never of a micro-batch or a device, and adds
    ``weight`` times the result to the loss. ``count`` must depend on masks only. Weight 0 reports without training.
    ``rows``, the values that ``sum`` adds up, are handed out by row where somebody wants them so.
    """

    sum: jax.Array
    """float32 scalar."""
    count: jax.Array
    """float32 scalar: how many positions are in the sum."""
    weight: float = 1.0
    rows: jax.Array | None = None
    """float32 [N], or None."""


class Frozen(nnx.Variable):
    """An array of an algorithm that is read and never trained."""


class Teacher(NamedTuple):
    """What the step knows of a teacher: the head that turns its hidden rows into logits."""

    head: Head
    """``valid`` marks the ids that are real in both vocabularies."""
    hidden_size: int
    path: str


_REGISTRY = Registry("algorithm", "distill.algorithm")
register_algorithm: Callable[[str], Callable[[type], type]] = _REGISTRY.register


def objective_options(config: Config) -> dict[str, Any]:
    """What ``distill`` says of the objective, as keywords of ``linear_objective``."""
    distill = config.distill
    options = dict(divergence=distill.loss, kd_ratio=distill.kd_ratio, temperature=distill.temperature)
    return options | dict(distill.loss_args)


def check_names(config: Config) -> None:
    """Refuse an unknown algorithm or divergence, parameters it does not take, or one not for rollouts where there are
    such, before anything is loaded.

    Raises UserError.
    """
    name, algorithm = config.distill.algorithm, _find(config)
    # Its own word, as with `arguments`: what inherits from it may learn from rollouts.
    if config.distill.on_policy_fraction and not vars(algorithm).get("rollouts", True):
        raise UserError(
            f"distill.algorithm={name} does not learn from rollouts: set distill.on_policy_fraction=0, or take "
            f"distill.algorithm=vanilla or policy_gradient"
        )
    find_divergence(config.distill.loss).checked(config.distill.temperature, dict(config.distill.loss_args))


def make_algorithm(config: Config, student: nnx.Module, teachers: tuple[Teacher, ...] = (), *, seed: int = 0) -> Any:
    """Build ``config.distill.algorithm``; without a teacher every run is supervised fine-tuning.

    Raises UserError when the name is unknown (the known ones are listed), when its file cannot be loaded, or when it
    does not take one of ``distill.algorithm_args``.
    """
    asked = _find(config)
    algorithm = asked if teachers else _REGISTRY.get("sft")
    return algorithm(student, teachers, config, rngs=nnx.Rngs(seed))


def _find(config: Config) -> type:
    """The class that ``distill.algorithm`` names; one without ``arguments`` looks at its parameters itself."""
    name, given = config.distill.algorithm, config.distill.algorithm_args
    algorithm = _REGISTRY.get(name)
    takes = vars(algorithm).get("arguments")  # its own: what it inherits from may take fewer
    unknown = [] if takes is None else [key for key in given if key not in takes]
    if unknown:
        raise UserError(
            f"distill.algorithm_args: {name} takes {' and '.join(takes) or 'none'}, not {', '.join(unknown)}"
        )
    return algorithm
