"""Divergences as pure functions of logits, and the same from hidden rows and heads without ever holding the logits."""

from kdjax.head import Head
from kdjax.losses.divergences import akl, ce, hrl, jsd, kl, rkl, skl, srkl, top1_ce, tvd
from kdjax.losses.linear import linear_divergence, linear_objective, linear_rows, linear_statistics
from kdjax.losses.registry import divergence, find_divergence, register_divergence
from kdjax.losses.vocab import MASKED, WHOLE, Vocab

__all__ = [
    "MASKED",
    "WHOLE",
    "Head",
    "Vocab",
    "akl",
    "ce",
    "divergence",
    "find_divergence",
    "hrl",
    "jsd",
    "kl",
    "linear_divergence",
    "linear_objective",
    "linear_rows",
    "linear_statistics",
    "register_divergence",
    "rkl",
    "skl",
    "srkl",
    "top1_ce",
    "tvd",
]
