"""The teacher's head, of families that no student has: which tensor, with which cap, scale and bias."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdjax.errors import UserError
from kdjax.models import teacher_head, teacher_shape

V, E = 24, 8
WEIGHT = np.random.default_rng(0).normal(size=(V, E)).astype(np.float32)


def folder(path, config, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"vocab_size": V, "hidden_size": E} | config))
    other = {"model.layers.0.mlp.experts.0.up_proj.weight": np.zeros((4, E), np.float32)}
    save_file({k: np.ascontiguousarray(v) for k, v in (tensors | other).items()}, path / "model.safetensors")
    return path


CASES = {
    "untied mixture of experts": ({"model_type": "qwen3_moe"}, {"lm_head.weight": WEIGHT}, {}),
    "gemma 2": (
        {"model_type": "gemma2", "tie_word_embeddings": True, "final_logit_softcapping": 30.0},
        {"model.embed_tokens.weight": WEIGHT},
        {"soft_cap": 30.0},
    ),
    "cohere": (
        {"tie_word_embeddings": True, "logit_scale": 0.25},
        {"model.embed_tokens.weight": WEIGHT},
        {"scale": 0.25},
    ),
    "granite": ({"logits_scaling": 8.0}, {"lm_head.weight": WEIGHT}, {"scale": 0.125}),
    "vision-language": (
        {"vocab_size": 3, "text_config": {"vocab_size": V, "hidden_size": E, "tie_word_embeddings": True}},
        {"model.language_model.embed_tokens.weight": WEIGHT},
        {},
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_head_with_all_that_makes_logits(tmp_path, case):
    config, tensors, expected = CASES[case]
    path = folder(tmp_path / "m", config, tensors)
    head, shape = teacher_head(path), teacher_shape(path)
    assert (shape.vocab_size, shape.hidden_size, head.layout) == (V, E, "vd")
    assert np.array_equal(head.weight, WEIGHT)
    assert {"soft_cap": head.soft_cap, "scale": head.scale} == {"soft_cap": None, "scale": 1.0} | expected
    hidden = np.random.default_rng(1).normal(size=(3, E)).astype(np.float32)
    logits = hidden.astype(np.float64) @ WEIGHT.T.astype(np.float64) * head.scale
    if head.soft_cap:
        logits = head.soft_cap * np.tanh(logits / head.soft_cap)
    assert np.allclose(head.logits(hidden), logits, atol=1e-5)


def test_bias_and_dtype(tmp_path):
    bias = np.arange(V, dtype=np.float32)
    tensors = {"lm_head.weight": WEIGHT.astype(ml_dtypes.bfloat16), "lm_head.bias": bias.astype(ml_dtypes.bfloat16)}
    path = folder(tmp_path / "m", {}, tensors)
    head = teacher_head(path)
    assert head.weight.dtype == ml_dtypes.bfloat16 and np.array_equal(head.bias, bias.astype(ml_dtypes.bfloat16))
    wide = teacher_head(path, dtype="float32")
    assert np.array_equal(wide.weight, WEIGHT.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({}, {"model.embed_tokens.weight": WEIGHT}, "no lm_head.weight"),
        ({"tie_word_embeddings": True}, {"other": WEIGHT}, "no tied embedding"),
        ({}, {"lm_head.weight": WEIGHT.astype(np.int8)}, "lm_head.weight is I8"),
        ({}, {"lm_head.weight": WEIGHT[:-1]}, "lm_head.weight is (23, 8), config.json says (24, 8)"),
        ({"hidden_size": None}, {"lm_head.weight": WEIGHT}, "config.json says"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(unchecked, tmp_path, config, tensors, words):
    path = folder(tmp_path / "m", config, tensors)
    with pytest.raises(UserError) as error:
        teacher_head(path)
    assert words in str(error.value)


def test_no_safetensors(tmp_path):
    path = folder(tmp_path / "m", {}, {})
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors file; a model folder needs model.safetensors, or shards with"):
        teacher_head(path)
