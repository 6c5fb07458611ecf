"""AdamW, its schedule, and which parameters it decays."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import optax

from kdjax.config import TrainConfig


def make_schedule(config: TrainConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate at step 0, 1, …: a linear rise over ``warmup_ratio`` of ``steps``, then the decay to ``min_lr``.

    The rise starts one notch above zero, so that no step is wasted, and the last step runs at ``min_lr``.
    """
    peak = config.learning_rate if peak is None else peak
    warmup = int(config.warmup_ratio * steps)
    decay_steps = max(steps - warmup - 1, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=config.min_lr / peak),
        "linear": optax.linear_schedule(peak, config.min_lr, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), decay], [warmup])


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Clipped AdamW (1711.05101) over the step's parameters ``{"student": …, "extra": …}``.

    ``extra`` are an algorithm's own parameters, with their own peak rate. Moments are float32.
    """

    def adamw(schedule: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(schedule, *config.betas, eps=config.eps, weight_decay=config.weight_decay, mask=decayed)

    groups = {
        "student": adamw(make_schedule(config, steps)),
        "extra": adamw(make_schedule(config, steps, config.extra_lr or config.learning_rate)),
    }
    clip = optax.identity() if config.max_grad_norm is None else optax.clip_by_global_norm(config.max_grad_norm)
    return optax.chain(clip, optax.partition(groups, _group_of_each))


def _group_of_each(params: dict[str, Any]) -> dict[str, Any]:
    return {name: jax.tree.map(partial(_constant, name), tree) for name, tree in params.items()}


def _constant(value: Any, _: Any) -> Any:
    return value


def decayed(params: Any) -> Any:
    """Which leaves weight decay acts on: matrices, told by name, as a stacked norm scale has two dimensions too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(word in jax.tree_util.keystr(path) for word in ("norm", "bias", "scale")), params
    )
