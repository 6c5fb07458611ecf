"""The student: a decoder-only transformer in Flax NNX, its layers stacked and scanned.

Every parameter of a block carries a leading layer dimension, so one block is traced and compiled whatever the depth.
Projection weights keep Hugging Face's order, output dimensions first, with heads split out ([H, head_dim, D]): import,
export and weight sync reshape and never transpose. What differs between families is a flag of ModelConfig.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kdjax import backend
from kdjax.arrays import AnyArray
from kdjax.errors import UserError
from kdjax.head import Head
from kdjax.models.attention import IMPLEMENTATIONS, causal_attention
from kdjax.models.config import ModelConfig
from kdjax.models.rope import angles, rotate, segment_positions
from kdjax.sharding import Rules, constrain

LAYER_INPUT, HOST_MEMORY = "layer_input", "pinned_host"


def _products(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """Matrix products with weights, and cuDNN's attention: a row costs more than the bytes it comes to."""
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **parameters)


REMAT = {
    "none": None,
    "dots": _products,
    "full": jax.checkpoint_policies.nothing_saveable,
    # What `full` keeps are the inputs of the layers, a few kB a token, which reach the host and are back sooner than a
    # layer computes. Products are a dozen times as large: faster computed again than fetched over PCIe.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst=HOST_MEMORY,
    ),
}


@dataclass(frozen=True)
class Compute:
    """How to run, as opposed to what: nothing here changes the weights."""

    dtype: str = "float32"  # of activations and of the weights as they are used
    param_dtype: str = "float32"  # of the weights as they are kept
    remat: str = "none"  # a key of REMAT
    attention: str = "xla"
    unroll: bool = False  # compile every layer apart: slower to compile, no copies in and out of the stack
    rules: Rules = Rules()

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dtype", self.dtype, ("float32", "bfloat16", "float16")),
            ("param_dtype", self.param_dtype, ("float32", "bfloat16", "float16")),
            ("remat", self.remat, tuple(REMAT)),
            ("attention", self.attention, IMPLEMENTATIONS),
        ):
            if value not in known:
                raise UserError(f"model: {name} {value!r} is not one of {', '.join(known)}")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise UserError("model: attention 'cudnn' needs dtype bfloat16 or float16, got float32")
        if self.remat == "offload" and HOST_MEMORY not in (m.kind for m in jax.devices()[0].addressable_memories()):
            raise UserError(f"model: remat 'offload' needs {HOST_MEMORY} memory, which {jax.devices()[0]} has not")


class Linear(nnx.Module):
    """``y = weight · x + bias`` over the trailing dimensions of x; ``weight`` is [*stack, *outputs, *inputs]."""

    def __init__(
        self,
        stack: tuple[int, ...],
        outputs: tuple[int, ...],
        inputs: tuple[int, ...],
        *,
        bias: bool,
        std: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        shape = stack + outputs + inputs
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(stack + outputs, dtype)) if bias else None
        self.contracted = len(inputs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        weight = self.weight[...].astype(x.dtype)
        n = self.contracted
        # One dimension of rows: with two, XLA fuses what makes a gradient into the copy that turns it for the weight's
        # product, and on two CPU cores an MLP with its gradient then takes nearly three times as long.
        rows = x.reshape(-1, *x.shape[x.ndim - n :])
        last = tuple(range(1, 1 + n)), tuple(range(weight.ndim - n, weight.ndim))
        y = jax.lax.dot_general(rows, weight, (last, ((), ()))).reshape(*x.shape[: x.ndim - n], *weight.shape[:-n])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dimension (1910.07467), reduced in float32.

    ``joins_next``: what follows works entry by entry and should take the rows as they are, and scale them itself; on a
    GPU XLA would write them in float32 between the two.
    """

    def __init__(self, stack: tuple[int, ...], size: int, *, eps: float, dtype: Any, joins_next: bool = False) -> None:
        self.weight = nnx.Param(jnp.ones((*stack, size), dtype))
        self.eps, self.joins_next = eps, joins_next

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.joins_next:
            (scale,) = backend.again(scale)
        wide = wide * scale
        return (wide * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (2305.13245), with normed queries and keys where the family has them."""

    def __init__(self, config: ModelConfig, compute: Compute, stack: tuple[int, ...], rngs: nnx.Rngs) -> None:
        width, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
        kv_heads = config.num_key_value_heads
        same = dict(std=config.initializer_range, dtype=compute.param_dtype, rngs=rngs)
        self.q = Linear(stack, (heads, size), (width,), bias=config.qkv_bias, **same)
        self.k = Linear(stack, (kv_heads, size), (width,), bias=config.qkv_bias, **same)
        self.v = Linear(stack, (kv_heads, size), (width,), bias=config.qkv_bias, **same)
        self.o = Linear(stack, (width,), (heads, size), bias=config.o_bias, **same)
        norm = dict(eps=config.rms_norm_eps, dtype=compute.param_dtype, joins_next=True)
        self.q_norm = RMSNorm(stack, size, **norm) if config.qk_norm else None
        self.k_norm = RMSNorm(stack, size, **norm) if config.qk_norm else None
        self.compute = compute

    def __call__(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S half"],
        sin: Float[Array, "B S half"],
        segment_ids: Int[AnyArray, "B S"] | None,
    ) -> Float[Array, "B S D"]:
        rules = self.compute.rules
        q = constrain(self.q(x), "batch", "sequence", "heads", "head_dim", rules=rules)
        k = constrain(self.k(x), "batch", "sequence", "kv_heads", "head_dim", rules=rules)
        v = constrain(self.v(x), "batch", "sequence", "kv_heads", "head_dim", rules=rules)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o(causal_attention(q, k, v, segment_ids, self.compute.attention))


class MLP(nnx.Module):
    """down(silu(gate(x)) · up(x)) (SwiGLU, 2002.05202)."""

    def __init__(self, config: ModelConfig, compute: Compute, stack: tuple[int, ...], rngs: nnx.Rngs) -> None:
        width, inner = (config.hidden_size,), (config.intermediate_size,)
        same = dict(bias=config.mlp_bias, std=config.initializer_range, dtype=compute.param_dtype, rngs=rngs)
        self.gate = Linear(stack, inner, width, **same)
        self.up = Linear(stack, inner, width, **same)
        self.down = Linear(stack, width, inner, **same)
        self.rules = compute.rules

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        inner = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(inner, "batch", "sequence", "mlp", rules=self.rules))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, compute: Compute, stack: tuple[int, ...], rngs: nnx.Rngs) -> None:
        norm = dict(size=config.hidden_size, eps=config.rms_norm_eps, dtype=compute.param_dtype)
        self.attention_norm = RMSNorm(stack, **norm)
        self.attention = Attention(config, compute, stack, rngs)
        self.mlp_norm = RMSNorm(stack, **norm)
        self.mlp = MLP(config, compute, stack, rngs)
        self.rules = compute.rules

    def __call__(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S half"],
        sin: Float[Array, "B S half"],
        segment_ids: Int[AnyArray, "B S"] | None,
    ) -> Float[Array, "B S D"]:
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x), cos, sin, segment_ids)
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "sequence", None, rules=self.rules)


class Embedding(nnx.Module):
    """A [V, D] table: looked up at the bottom, and Hugging Face's layout of an output head at the top."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, compute.param_dtype))


class Decoder(nnx.Module):
    """A causal language model whose families differ by flags of ``config`` alone.

    Build one with ``load_model`` or ``init_model``; the constructor makes random weights on the default device
    (normal with ``initializer_range``, zero biases, unit norms, as transformers does).
    """

    def __init__(self, config: ModelConfig, compute: Compute, *, rngs: nnx.Rngs) -> None:
        self.embed = Embedding(config, compute, rngs)
        self.layers = Block(config, compute, (config.num_hidden_layers,), rngs)
        self.norm = RMSNorm((), config.hidden_size, eps=config.rms_norm_eps, dtype=compute.param_dtype)
        self.lm_head = None if config.tie_word_embeddings else Embedding(config, compute, rngs)
        self.config = config
        self.compute = compute

    def __call__(
        self,
        tokens: Int[AnyArray, "B S"],
        positions: Int[AnyArray, "B S"] | None = None,
        segment_ids: Int[AnyArray, "B S"] | None = None,
        *,
        hidden_layers: Sequence[int] = (),
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], tuple[Float[Array, "B S D"], ...]]:
        """Hidden states after the final norm, in the compute dtype.

        Args:
            tokens: ids; what stands in padding does not matter.
            positions: by default 0, 1, … within each segment.
            segment_ids: rows attend within their own segment; 0 is padding, whose outputs are finite and meaningless.
            hidden_layers: also return the residual stream after that many blocks, before the final norm: 0 is the
                embedding, L the last block, negative numbers count from L + 1 as in Python. Then the result is
                ``(hidden, (states, …))`` in the order asked for.
        """
        depth = self.config.num_hidden_layers
        for i in hidden_layers:
            if not -depth - 1 <= i <= depth:
                raise UserError(f"hidden_layers: {i} is not in 0 … {depth} for a model of {depth} layers")
        if positions is None:
            positions = (
                jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
                if segment_ids is None
                else segment_positions(segment_ids)
            )
        rules, dtype = self.compute.rules, self.compute.dtype
        # Gathering the embedding dimension first keeps the look-up local to each vocabulary shard.
        table = constrain(self.embed.weight[...], "vocab", None, rules=rules)
        x = constrain(jnp.take(table, tokens, axis=0).astype(dtype), "batch", "sequence", None, rules=rules)
        cos, sin = angles(positions, self.config.rope, self.config.head_dim)

        graph, stacked = nnx.split(self.layers)
        stacked = self._narrowed(stacked)

        def layer(x, weights):
            x = checkpoint_name(x, LAYER_INPUT)
            y = nnx.merge(graph, weights)(x, cos, sin, segment_ids)
            return y, (y if hidden_layers else None)

        if self.compute.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.compute.remat], prevent_cse=self.compute.unroll)
        last, states = jax.lax.scan(layer, x, stacked, unroll=depth if self.compute.unroll else 1)
        hidden = self.norm(last)
        if not hidden_layers:
            return hidden
        chosen = (i % (depth + 1) for i in hidden_layers)
        return hidden, tuple(x if i == 0 else states[i - 1] for i in chosen)

    def _narrowed(self, stacked: nnx.State) -> nnx.State:
        """The layers with their projections in the compute dtype, where memory is what a cast costs.

        In the loop a layer's weights would be cast for it and once more for its gradient, and the gradient, which a
        GPU's products leave in the compute dtype, be widened layer by layer: more than twice the traffic. A CPU's
        products leave it in float32, and so it stays.
        """
        dtype = jnp.dtype(self.compute.dtype)
        if backend.on_cpu() or dtype.itemsize >= jnp.dtype(self.compute.param_dtype).itemsize:
            return stacked
        linear = {path for path, module in nnx.iter_modules(self.layers) if isinstance(module, Linear)}
        return nnx.map_state(lambda path, x: x.astype(dtype) if path[:-1] in linear else x, stacked)

    def head(self) -> Head:
        """The output head as the losses take it: [V, D], in the dtype the weights are kept in."""
        table = self.embed if self.lm_head is None else self.lm_head
        return Head(table.weight[...], layout="vd")

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32 logits of ``hidden`` (after the final norm)."""
        return self.head().logits(hidden)
