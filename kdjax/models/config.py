"""What a checkpoint says it is: a frozen ModelConfig read from a Hugging Face ``config.json``.

Families are rows of ``FAMILIES``. A decoder of pre-norm blocks with rotary positions and a gated MLP joins by one row:
its ``model_type``, its architecture's name, and for each optional part (biases, norms of queries and keys) either a
fixed answer or the key of ``config.json`` that decides. New tensor names go into ``kdjax.models.weights``, a new part
of the computation into ``kdjax.models.decoder`` behind a flag of ModelConfig.

Whatever this package would compute wrongly (sliding windows in use, experts, partial rotary, quantised weights, unknown
rope scaling) is refused here by name, before a single weight is read.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kdjax.errors import UserError


@dataclass(frozen=True)
class Family:
    """One architecture. A string names the ``config.json`` key that decides, False where the key is absent."""

    architecture: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    head_dim: int | None = None  # transformers' default where config.json is silent; None: hidden_size / heads


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, head_dim=128),
}


@dataclass(frozen=True)
class Rope:
    """Rotary positions (2104.09864); ``scaling`` "llama3" stretches the long wavelengths as Llama 3.1 does."""

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's numbers, under the names ``config.json`` uses. Hashable, so it can be static under ``jax.jit``."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(f"model: family {self.family!r} is not one of {', '.join(FAMILIES)}")
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise UserError(f"model: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model: head_dim must be even for rotary positions, got {self.head_dim}")

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json", **overrides: Any) -> ModelConfig:
        """Read the mapping that transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) or 5
        (``rope_parameters``, ``dtype``) writes. ``overrides`` replace keys of ``config.json`` before it is read, so a
        student may be ``num_hidden_layers=4`` of its teacher.

        Raises UserError for an unknown architecture, a missing number, or an option we do not compute.
        """
        known = set(raw) | set(_SIZES) | {"tie_word_embeddings", "rms_norm_eps", "initializer_range", "rope_theta"}
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(f"model overrides: {name!r} is no key of {where}{hint}")
        raw = {**raw, **overrides}
        if "num_hidden_layers" in overrides and "layer_types" not in overrides and raw.get("layer_types"):
            raw["layer_types"] = list(raw["layer_types"])[: overrides["num_hidden_layers"]]
        kind = raw.get("model_type")
        family = FAMILIES.get(kind)
        if family is None:
            raise UserError(f"{where}: model_type {kind!r} is not supported; known are {', '.join(FAMILIES)}")
        _refuse_unsupported(raw, where)

        def flag(rule: bool | str) -> bool:
            return bool(raw.get(rule, False)) if isinstance(rule, str) else rule

        def size(name: str, default: int | None = None) -> int:
            value = raw.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{where}: {name} must be a positive whole number, got {value!r}")
            return value

        heads = size("num_attention_heads")
        head_dim = raw["head_dim"] if "head_dim" in raw else family.head_dim
        if head_dim is None and size("hidden_size") % heads:
            raise UserError(
                f"{where}: hidden_size {raw['hidden_size']} does not divide into {heads} heads; set head_dim"
            )
        return cls(
            family=kind,
            vocab_size=size("vocab_size"),
            hidden_size=size("hidden_size"),
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", head_dim or raw["hidden_size"] // heads),
            max_position_embeddings=size("max_position_embeddings", 4096),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw, where),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            initializer_range=float(raw.get("initializer_range", 0.02)),
            qkv_bias=flag(family.qkv_bias),
            o_bias=flag(family.o_bias),
            mlp_bias=flag(family.mlp_bias),
            qk_norm=family.qk_norm,
        )

    @classmethod
    def from_folder(cls, folder: str | Path, **overrides: Any) -> ModelConfig:
        """Read ``folder/config.json``; one line says what is wrong with it."""
        return cls.from_hf(read_json(Path(folder) / "config.json"), str(Path(folder) / "config.json"), **overrides)

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """``config.json`` in transformers 5's spelling, with transformers 4's beside it; ``dtype``: of the weights."""
        rope: dict[str, Any] = {"rope_type": self.rope.scaling, "rope_theta": self.rope.theta}
        if self.rope.scaling == "llama3":
            rope |= {name: getattr(self.rope, name) for name in _LLAMA3}
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"} if self.rope.scaling != "default" else None
        family = FAMILIES[self.family]
        flags = {
            rule: getattr(self, name)
            for name in ("qkv_bias", "o_bias", "mlp_bias")
            if isinstance(rule := getattr(family, name), str)
        }
        return {
            "architectures": [family.architecture],
            "model_type": self.family,
            **{name: getattr(self, name) for name in _SIZES},
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tie_word_embeddings,
            **flags,
            "rope_parameters": rope,
            "rope_theta": self.rope.theta,
            "rope_scaling": scaling,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    @property
    def untied(self) -> bool:
        return not self.tie_word_embeddings

    def with_layers(self, count: int) -> ModelConfig:
        return replace(self, num_hidden_layers=count)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_LLAMA3 = tuple(f.name for f in fields(Rope) if f.name not in ("theta", "scaling"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; UserError where there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model folder needs config.json and *.safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    """Options that change the forward pass and that the decoder does not have."""
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"{where}: weights are quantised ({method}); only float32, bfloat16 and float16 are supported")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(key):
            raise UserError(f"{where}: {key} {raw[key]}: mixtures of experts are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported; only silu")
    kinds = raw.get("layer_types")
    if kinds:
        for kind in sorted(set(kinds) - {"full_attention"}):
            raise UserError(f"{where}: layer_types holds {kind!r}; only full_attention is supported")
    elif raw.get("use_sliding_window") and raw.get("sliding_window"):
        if raw.get("max_window_layers", 28) < raw.get("num_hidden_layers", 0):
            raise UserError(
                f"{where}: use_sliding_window with window {raw['sliding_window']} is not supported; "
                "only full attention (use_sliding_window: false)"
            )
    if raw.get("attention_dropout"):
        raise UserError(f"{where}: attention_dropout {raw['attention_dropout']} is not supported; set it to 0.0")
    if raw.get("pretraining_tp", 1) != 1:
        raise UserError(f"{where}: pretraining_tp {raw['pretraining_tp']} is not supported; only 1")


def _rope(raw: Mapping[str, Any], where: str) -> Rope:
    """Both spellings: ``rope_parameters`` (5), or ``rope_theta`` with ``rope_scaling`` (4; older still: ``type``)."""
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    given = {**old, **new}
    theta = raw.get("rope_theta", 10000.0) if "rope_theta" not in given else given["rope_theta"]
    partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor {partial} is not supported; only 1.0")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return Rope(theta=float(theta))
    if kind != "llama3":
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; known are default, llama3")
    for name in _LLAMA3:
        if name not in given:
            raise UserError(f"{where}: rope scaling llama3 needs {name}")
    return Rope(
        theta=float(theta),
        scaling="llama3",
        factor=float(given["factor"]),
        low_freq_factor=float(given["low_freq_factor"]),
        high_freq_factor=float(given["high_freq_factor"]),
        original_max_position_embeddings=int(given["original_max_position_embeddings"]),
    )
