"""The divergences as one writes them down on logits of all rows, once for JAX and torch: what the fused loss is held
against. Independent of the library's own; names, directions and defaults are those of docs/losses.md, τ = 1.

Each takes a ``Library`` and log-probabilities of student and teacher, [N, V], and gives [N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import log
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Library:
    """What the formulas need that JAX and torch call by different names; arrays are along their last axis."""

    log_softmax: Callable
    exp: Callable
    abs: Callable
    relu: Callable
    logaddexp: Callable
    cumsum: Callable
    order: Callable
    """ids, ascending by value, equal ones by id"""
    take: Callable
    top: Callable
    """ids of the k largest"""
    constant: Callable
    """without gradient"""
    kl: Callable
    """KL(a ‖ b) of the logarithms of b and a"""


def kl(of: Library, log_q: Any, log_p: Any) -> Any:
    return of.kl(log_q, log_p)


def rkl(of: Library, log_q: Any, log_p: Any) -> Any:
    return of.kl(log_p, log_q)


def jsd(of: Library, log_q: Any, log_p: Any, beta: float = 0.5) -> Any:
    log_m = of.logaddexp(log_p + log(beta), log_q + log(1 - beta))
    return beta * of.kl(log_m, log_p) + (1 - beta) * of.kl(log_m, log_q)


def skl(of: Library, log_q: Any, log_p: Any, skew: float = 0.1) -> Any:
    return of.kl(of.logaddexp(log_p + log(skew), log_q + log(1 - skew)), log_p)


def srkl(of: Library, log_q: Any, log_p: Any, skew: float = 0.1) -> Any:
    return of.kl(of.logaddexp(log_p + log(1 - skew), log_q + log(skew)), log_q)


def akl(of: Library, log_q: Any, log_p: Any, alpha: float = 0.5) -> Any:
    p, q = of.exp(log_p), of.exp(log_q)
    order = of.order(log_p)
    in_tail = of.cumsum(of.take(p, order)) <= alpha
    gap = of.take(of.abs(p - q), order)
    head, tail = (gap * ~in_tail).sum(-1), (gap * in_tail).sum(-1)
    w = of.constant(head / (head + tail))
    return w * of.kl(log_q, log_p) + (1 - w) * of.kl(log_p, log_q)


def tvd(of: Library, log_q: Any, log_p: Any) -> Any:
    return 0.5 * of.abs(of.exp(log_p) - of.exp(log_q)).sum(-1)


def top1_ce(of: Library, log_q: Any, log_p: Any) -> Any:
    best = of.top(log_p, 1)
    return -(of.exp(of.take(log_p, best)) * of.take(log_q, best))[..., 0]


def hrl(of: Library, log_q: Any, log_p: Any, k: int = 5) -> Any:
    teacher, student = of.top(log_p, k), of.top(log_q, k)
    q = of.exp(log_q)
    q_teacher, q_student = of.take(q, teacher), of.take(q, student)
    swapped = of.take(log_p, teacher)[..., :, None] > of.take(log_p, student)[..., None, :]
    misplaced = of.relu(q_student[..., None, :] - q_teacher[..., :, None])
    return of.relu(q_teacher - q_teacher[..., :1]).sum(-1) + (swapped * misplaced).sum((-2, -1))


DIVERGENCES = {f.__name__: f for f in (kl, rkl, jsd, skl, srkl, akl, tvd, top1_ce, hrl)}

JAX = Library(
    log_softmax=jax.nn.log_softmax,
    exp=jnp.exp,
    abs=jnp.abs,
    relu=jax.nn.relu,
    logaddexp=jnp.logaddexp,
    cumsum=lambda x: jnp.cumsum(x, -1),
    order=lambda x: jnp.argsort(x, -1, stable=True),
    take=lambda x, ids: jnp.take_along_axis(x, ids, -1),
    top=lambda x, k: jax.lax.top_k(x, k)[1],
    constant=jax.lax.stop_gradient,
    kl=lambda log_b, log_a: (jnp.exp(log_a) * (log_a - log_b)).sum(-1),
)


@cache
def torch_library() -> Library:
    import torch  # only this comparison needs it

    kl_div = torch.nn.functional.kl_div  # takes fewer passes than the formula written out
    return Library(
        log_softmax=lambda x: torch.log_softmax(x, -1),
        exp=torch.exp,
        abs=torch.abs,
        relu=torch.relu,
        logaddexp=torch.logaddexp,
        cumsum=lambda x: torch.cumsum(x, -1),
        order=lambda x: torch.argsort(x, dim=-1, stable=True),
        take=lambda x, ids: torch.take_along_dim(x, ids, -1),
        top=lambda x, k: torch.topk(x, k).indices,
        constant=lambda x: x.detach(),
        kl=lambda log_b, log_a: kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1),
    )
