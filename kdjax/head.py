"""The last linear map of a language model, with everything that turns its product into logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.arrays import AnyArray
from kdjax.errors import UserError


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "bias", "valid"),
    meta_fields=("soft_cap", "scale", "layout"),
)
@dataclass(frozen=True)
class Head:
    """``logits = cap(scale · (hidden @ weight + bias))`` with ``cap(x) = soft_cap · tanh(x / soft_cap)``.

    A pytree: ``weight``, ``bias`` and ``valid`` are leaves, the rest is static.
    """

    weight: Float[AnyArray, "_ _"]
    """[D, V], or [V, D] in layout ``"vd"``."""
    bias: Float[AnyArray, " V"] | None = None
    soft_cap: float | None = None
    """Gemma 2's final-logit soft-cap (2408.00118)."""
    scale: float = 1.0
    """What logits are multiplied by, as in Cohere's ``logit_scale`` or one over Granite's ``logits_scaling``."""
    layout: Literal["dv", "vd"] = "dv"
    """``"vd"`` is Hugging Face's [V, D]; it is used as it lies, without a transposed copy."""
    valid: Bool[AnyArray, " V"] | None = None
    """Ids that the model's tokenizer knows; None: all. Divergences leave the others out, cross-entropy does not."""

    def __post_init__(self) -> None:
        if self.layout not in ("dv", "vd"):
            raise UserError(f"head: layout {self.layout!r} is neither 'dv' ([D, V]) nor 'vd' ([V, D])")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise UserError(f"head: soft_cap {self.soft_cap} is not positive; None means no cap")

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[self.layout.index("v")]

    @property
    def width(self) -> int:
        """D."""
        return self.weight.shape[self.layout.index("d")]

    def logits(self, hidden: Float[AnyArray, "*rows D"]) -> Float[Array, "*rows V"]:
        """float32 logits; the product is taken in the dtype of ``hidden`` and accumulated in float32."""
        return self.finish(product(hidden, self.weight.astype(hidden.dtype), self.layout), self.bias)

    def finish(self, raw: Float[Array, "*rows V"], bias: Float[AnyArray, " V"] | None) -> Float[Array, "*rows V"]:
        """The float32 logits of a raw product: bias, then scale, then soft-cap."""
        if bias is not None:
            raw = raw + bias.astype(jnp.float32)
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.soft_cap is not None:
            raw = self.soft_cap * jnp.tanh(raw / self.soft_cap)
        return raw


def as_head(head: Head | Float[AnyArray, "D V"]) -> Head:
    """A Head, made of a plain [D, V] weight if need be."""
    return head if isinstance(head, Head) else Head(head)


def product(hidden: AnyArray, weight: AnyArray, layout: str) -> Array:
    """float32 [..., V] of [..., D] and a weight in ``layout``."""
    return jnp.einsum(f"...d,{layout}->...v", hidden, weight, preferred_element_type=jnp.float32)
