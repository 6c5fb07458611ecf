"""The weight table: Hugging Face tensor name ↔ parameter path, layout and logical axes, in one row a tensor.

Import, export, weight sync and shardings all read it. ``layout`` names the dimensions of the Hugging Face tensor in
their order; parentheses hold dimensions that it merges and the parameter keeps apart::

    Weight("model.layers.{layer}.self_attn.q_proj.weight", "layers.attention.q.weight", "(heads head_dim) embed")

is [heads · head_dim, embed] in the file and [layers, heads, head_dim, embed] in the model. The names are the logical
axes of ``kdjax.sharding.Rules``; ``_`` is a dimension that is never split. The order of dimensions is the same on both
sides, so a tensor crosses by reshaping alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from kdjax.errors import UserError
from kdjax.models.config import ModelConfig
from kdjax.sharding import Rules

Path = tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """One row: a tensor of the checkpoint, or one tensor a layer where the name holds ``{layer}``."""

    name: str
    target: str
    layout: str
    when: str | None = None  # the flag of ModelConfig that says whether the model has it

    @cached_property
    def path(self) -> Path:
        return tuple(self.target.split("."))

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The dimensions of the tensor, each as the parameter's dimensions that it merges."""
        return tuple(tuple(g.strip("()").split()) for g in re.findall(r"\([^)]*\)|\S+", self.layout))

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    @cached_property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of the parameter, the layer dimension included."""
        named = tuple(None if axis == "_" else axis for group in self.groups for axis in group)
        return ("layers", *named) if self.stacked else named

    def names(self, config: ModelConfig) -> list[str]:
        count = config.num_hidden_layers if self.stacked else 1
        return [self.name.format(layer=i) for i in range(count)]

    def tensor_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        return tuple(prod(self._size(axis, config) for axis in group) for group in self.groups)

    def part_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape of the parameter, of one layer where it is stacked."""
        return tuple(self._size(axis, config) for group in self.groups for axis in group)

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return (config.num_hidden_layers, *self.part_shape(config)) if self.stacked else self.part_shape(config)

    def _size(self, axis: str, config: ModelConfig) -> int:
        if axis == "_":  # a norm's scale: over one head for queries and keys, else over the width
            return config.head_dim if self.when == "qk_norm" else config.hidden_size
        return getattr(config, _SIZE[axis])


_SIZE = {
    "embed": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
}

_LAYER, _BLOCK = "model.layers.{layer}.", "layers."
_ATTENTION, _MLP = (_LAYER + "self_attn.", _BLOCK + "attention."), (_LAYER + "mlp.", _BLOCK + "mlp.")


def _projection(where: tuple[str, str], name: str, inputs: str, outputs: str, bias: str) -> tuple[Weight, Weight]:
    theirs, ours = where
    return (
        Weight(f"{theirs}{name}_proj.weight", f"{ours}{name}.weight", f"{outputs} {inputs}"),
        Weight(f"{theirs}{name}_proj.bias", f"{ours}{name}.bias", outputs, when=bias),
    )


LLAMA_TABLE: tuple[Weight, ...] = (
    Weight("model.embed_tokens.weight", "embed.weight", "vocab embed"),
    Weight(_LAYER + "input_layernorm.weight", _BLOCK + "attention_norm.weight", "_"),
    *_projection(_ATTENTION, "q", "embed", "(heads head_dim)", "qkv_bias"),
    *_projection(_ATTENTION, "k", "embed", "(kv_heads head_dim)", "qkv_bias"),
    *_projection(_ATTENTION, "v", "embed", "(kv_heads head_dim)", "qkv_bias"),
    *_projection(_ATTENTION, "o", "(heads head_dim)", "embed", "o_bias"),
    Weight(_ATTENTION[0] + "q_norm.weight", _ATTENTION[1] + "q_norm.weight", "_", when="qk_norm"),
    Weight(_ATTENTION[0] + "k_norm.weight", _ATTENTION[1] + "k_norm.weight", "_", when="qk_norm"),
    Weight(_LAYER + "post_attention_layernorm.weight", _BLOCK + "mlp_norm.weight", "_"),
    *_projection(_MLP, "gate", "embed", "mlp", "mlp_bias"),
    *_projection(_MLP, "up", "embed", "mlp", "mlp_bias"),
    *_projection(_MLP, "down", "mlp", "embed", "mlp_bias"),
    Weight("model.norm.weight", "norm.weight", "_"),
    Weight("lm_head.weight", "lm_head.weight", "vocab embed", when="untied"),
)

TABLES: dict[str, tuple[Weight, ...]] = {"llama": LLAMA_TABLE, "qwen2": LLAMA_TABLE, "qwen3": LLAMA_TABLE}

# Buffers that old checkpoints carry and that follow from the configuration.
IGNORABLE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")


def weight_table(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows that a model of this configuration has."""
    return tuple(w for w in TABLES[config.family] if w.when is None or getattr(config, w.when))


def param_shardings(config: ModelConfig, mesh: Mesh, rules: Rules) -> dict[Path, NamedSharding]:
    """Where each parameter lives, by path; a dimension that its mesh axes do not divide stays whole."""
    return {w.path: rules.sharding(mesh, w.axes, w.shape(config)) for w in weight_table(config)}


def state_shardings(model: nnx.Module, mesh: Mesh) -> nnx.State:
    """The same as a State like ``nnx.state(model, nnx.Param)``, for ``in_shardings`` and ``out_shardings``."""
    by_path = param_shardings(model.config, mesh, model.compute.rules)
    state = nnx.state(model, nnx.Param)
    return nnx.from_flat_state([(path, leaf.replace(by_path[path])) for path, leaf in nnx.to_flat_state(state)])


def parameters(model: nnx.Module) -> dict[Path, nnx.Param]:
    """The model's parameters by path: the very Variables, so assigning to one changes the model."""
    return dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))


def hf_tensors(model: nnx.Module, dtype: Any = None) -> Iterator[tuple[str, jax.Array]]:
    """Every tensor of the checkpoint by its Hugging Face name, in table order, as a device array of its shape there.

    One layer at a time, so no second copy of the model exists. ``dtype`` None keeps the parameters' own. A tied head
    appears once, under the embedding's name. This is also what a weight sync sends.
    """
    config, values = model.config, parameters(model)
    for row in weight_table(config):
        value = values[row.path][...]
        for layer, name in enumerate(row.names(config)):
            part = _layer(value, np.int32(layer)) if row.stacked else value
            yield name, part.reshape(row.tensor_shape(config)).astype(dtype or value.dtype)


@jax.jit
def _layer(stacked: jax.Array, layer: jax.Array) -> jax.Array:
    """``stacked[layer]``; a plain index is part of the program on one device, which is then compiled for each layer."""
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def check_names(found: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Exactly the table's tensors, in the table's shapes; everything that differs is named in one line."""
    wanted = {name: row.tensor_shape(config) for row in weight_table(config) for name in row.names(config)}
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    wrong = [f"{n} is {found[n]}, expected {s}" for n, s in wanted.items() if n in found and found[n] != s]
    faults = [
        f"{title} {_some(names)}"
        for title, names in (("missing", missing), ("unknown", unknown), ("misshaped:", wrong))
        if names
    ]
    if faults:
        raise UserError(f"{where}: tensors do not fit a {config.family} model of config.json: {'; '.join(faults)}")


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
