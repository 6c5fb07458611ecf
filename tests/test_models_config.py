"""Is config.json understood in both spellings, and refused where the decoder would compute something else?"""

import json

import pytest
from models_reference import LLAMA3_ROPE, reference

from kdjax.errors import UserError
from kdjax.models import FAMILIES, ModelConfig, Rope

BASE = dict(
    model_type="qwen3",
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def test_both_spellings_mean_the_same():
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    old = ModelConfig.from_hf(
        {**BASE, "model_type": "llama", "rope_theta": 500.0, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    )
    new = ModelConfig.from_hf({**BASE, "model_type": "llama", "rope_parameters": LLAMA3_ROPE, "dtype": "bfloat16"})
    assert old == new
    assert new.rope == Rope(500.0, "llama3", 8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
    ],
)
def test_plain_rope_in_every_spelling(spelling):
    assert ModelConfig.from_hf({**BASE, **spelling}).rope == Rope(theta=1e6)


@pytest.mark.parametrize("name", ["llama3-rope", "llama-biased", "qwen2-tied", "qwen3"])
def test_what_transformers_writes_is_read_back(name, tmp_path):
    config = reference(name).config
    config.save_pretrained(tmp_path)
    ours = ModelConfig.from_folder(tmp_path)
    assert (ours.family, ours.hidden_size, ours.num_hidden_layers) == (config.model_type, 32, 3)
    assert ours.tie_word_embeddings == config.tie_word_embeddings
    assert ours.rope.theta == config.rope_parameters["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf("float32")))
    assert ModelConfig.from_folder(tmp_path) == ours


def test_families_differ_by_their_flags():
    flags = {
        kind: (c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm)
        for kind in FAMILIES
        for c in [ModelConfig.from_hf({**BASE, "model_type": kind})]
    }
    assert flags == {
        "llama": (False, False, False, False),
        "qwen2": (True, False, False, False),
        "qwen3": (False, False, False, True),
    }
    biased = ModelConfig.from_hf({**BASE, "model_type": "llama", "attention_bias": True, "mlp_bias": True})
    assert biased.qkv_bias and biased.o_bias and biased.mlp_bias


def test_defaults_are_those_of_the_family():
    silent = {k: v for k, v in BASE.items() if k != "head_dim"}
    assert ModelConfig.from_hf(silent).head_dim == 128  # Qwen3's default does not follow from the width
    assert ModelConfig.from_hf({**silent, "model_type": "qwen2"}).head_dim == 8
    assert ModelConfig.from_hf({**silent, "model_type": "llama", "num_key_value_heads": None}).num_key_value_heads == 4


def test_configuration_is_hashable():
    assert len({ModelConfig.from_hf(BASE), ModelConfig.from_hf(BASE)}) == 1


def test_a_sliding_window_that_is_switched_off_is_fine():
    ModelConfig.from_hf({**BASE, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 0})
    ModelConfig.from_hf({**BASE, "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported; known are llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "use_sliding_window with window 64",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope scaling 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope scaling llama3 needs low_freq_factor"),
        ({"num_experts": 8}, "num_experts 8: mixtures of experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"weights are quantised \(fp8\)"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
        ({"vocab_size": None}, "vocab_size must be a positive whole number, got None"),
        ({"hidden_size": "32"}, "hidden_size must be a positive whole number, got '32'"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
        ({"head_dim": 15}, "head_dim must be even for rotary positions, got 15"),
        ({"head_dim": None, "hidden_size": 30}, "hidden_size 30 does not divide into 4 heads"),
    ],
)
def test_refused_by_name(change, message):
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_hf({**BASE, **change}, "some/config.json")
    assert "\n" not in str(caught.value)


def test_overrides_are_checked():
    assert ModelConfig.from_hf(BASE, num_hidden_layers=1).num_hidden_layers == 1
    with pytest.raises(UserError, match="'num_hidden_layer' is no key of config.json; did you mean num_hidden_layers"):
        ModelConfig.from_hf(BASE, num_hidden_layer=1)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        ModelConfig.from_folder(tmp_path)
