"""Divergences by name: the built-in ones, those that a user registers, and ``path/my.py:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.arrays import AnyArray, Number
from kdjax.errors import UserError
from kdjax.losses.vocab import WHOLE, Vocab
from kdjax.registry import Registry

_REGISTRY = Registry("divergence", "distill.loss")


@dataclass(frozen=True)
class Divergence:
    """A function of student and teacher logits, and whether it can work on part of a vocabulary."""

    name: str
    fn: Callable[..., Array]
    split_vocab: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters it takes besides logits."""
        names = tuple(inspect.signature(self.fn).parameters)[2:]
        return tuple(n for n in names if not (self.split_vocab and n == "vocab"))

    def __call__(self, student: AnyArray, teacher: AnyArray, vocab: Vocab = WHOLE, **params: Any) -> Array:
        if self.split_vocab:
            return self.fn(student, teacher, vocab=vocab, **params)

        def values(student: AnyArray, teacher: AnyArray) -> Array:
            found = jnp.asarray(self.fn(student, teacher, **params))
            if found.shape != student.shape[:-1]:
                raise UserError(
                    f"divergence {self.name!r} must return one value a row, without a sum or a mean over rows: "
                    f"shape {student.shape[:-1]} for logits {student.shape}, but it returned {found.shape}"
                )
            return found.astype(jnp.float32)

        return vocab.by_rows(values, student, teacher)

    def checked(self, temperature: Any, params: dict[str, Any]) -> dict[str, Any]:
        """``params`` with the temperature, if the function takes one. Raises UserError for what it does not take."""
        signature = inspect.signature(self.fn).parameters
        params = {"temperature": temperature, **params}
        if any(p.kind is p.VAR_KEYWORD for p in signature.values()):
            return params
        if "temperature" not in signature and not isinstance(temperature, jax.Array) and temperature == 1.0:
            del params["temperature"]
        unknown = sorted(set(params) - set(self.parameters))
        if unknown:
            takes = ", ".join(self.parameters) or "none"
            raise UserError(f"divergence {self.name!r} takes no {', '.join(unknown)}; its parameters: {takes}")
        return params


def register_divergence(name: str, *, split_vocab: bool = False) -> Callable[[Callable[..., Array]], Callable]:
    """A decorator that makes ``fn(student_logits, teacher_logits, *, temperature=1.0, **params)`` known as ``name``.

    The function maps float32 [..., V] and [..., V] to [...]. Ids that are not valid on both sides arrive with the
    logit −1e30 on both: probability 0, and a log-probability that is finite.

    Args:
        name: what ``distill.loss`` and ``divergence=`` call it.
        split_vocab: the function also takes ``vocab`` (``kdjax.losses.Vocab``), reduces over the vocabulary only by
            it, and so works where the vocabulary is split over devices. Otherwise whole rows are brought together,
            one chunk at a time.

    Raises ValueError when another function has the name.
    """

    def add(fn: Callable[..., Array]) -> Callable[..., Array]:
        _REGISTRY.register(name)(fn)
        if split_vocab:
            _SPLIT.add(fn)
        return fn

    return add


_SPLIT: set[Callable[..., Array]] = set()


def find_divergence(divergence: str | Callable[..., Array]) -> Divergence:
    """By name, by ``path/my.py:function``, or the function itself. Raises UserError, with the known names."""
    if not isinstance(divergence, str):
        name = getattr(divergence, "__name__", repr(divergence))
        return Divergence(name, divergence, divergence in _SPLIT)
    fn = _REGISTRY.get(divergence)
    return Divergence(divergence, fn, fn in _SPLIT)


def divergence(
    name: str | Callable[..., Array],
    student_logits: Float[AnyArray, "*rows V"],
    teacher_logits: Float[AnyArray, "*rows V"] | Int[AnyArray, "*rows"],
    *,
    temperature: Number = 1.0,
    **params: Any,
) -> Float[Array, "*rows"]:
    """The divergence called ``name`` of two blocks of logits, one value a row, natural logarithm, no τ² factor.

    Cross-entropy (``"ce"``) takes labels in the place of the teacher's logits.

    Raises UserError for an unknown name (known ones are listed), for a parameter that it does not take or a value
    outside its range, and for unequal vocabularies.
    """
    found = find_divergence(name)
    return found(student_logits, teacher_logits, **found.checked(temperature, params))
