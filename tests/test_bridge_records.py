"""Are the records that cross the border checked where they are made, and weights and model facts read as they are?"""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bridge.bucket_tensors import load_bucket
from bridge.checkpoint import read_facts
from bridge.engine import Prefill, Sampling
from bridge.segments import SHARED
from bridge.weight_sync import WeightBucket

IDS = np.arange(1, 9, dtype=np.int32)


@pytest.mark.parametrize(
    "spans", [(), ((3, 3),), ((2, 9),), ((4, 6), (5, 8)), ((5, 8), (0, 2)), ((-1, 2),)], ids=lambda spans: str(spans)
)
def test_spans_that_cannot_be_are_refused(spans):
    with pytest.raises(ValueError, match="span"):
        Prefill(IDS, spans, 0)


def test_a_prefill_counts_its_rows():
    assert Prefill(IDS, ((0, 2), (2, 3), (7, 8)), 5).count == 4


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"n": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}]
)
def test_samplings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError):
        Sampling(**wrong)


def test_weights_cross_in_buckets_and_in_their_dtypes():
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "c": np.float32(2.5).reshape(()),
        "d": rng.normal(size=(4, 6)).astype(np.float32).T,
        "e": rng.normal(size=(30,)).astype(np.float16),
    }
    got, sizes = {}, []
    bucket = WeightBucket(192)
    for entries in bucket.fill(arrays.items()):
        load_bucket(bucket.spec, entries, lambda tensors: got.update((n, tensor.clone()) for n, tensor in tensors))
        sizes.append(len(entries))
    assert list(SHARED.glob("kdjax-weights-*"))
    with pytest.raises(ValueError, match="weight big of 256 bytes exceeds the bucket of 192"):
        list(bucket.fill([("big", np.zeros(64, np.float32))]))
    bucket.close()
    assert not os.path.exists(bucket.spec.path)
    assert len(sizes) > 1 and sum(sizes) == len(arrays)
    for name, array in arrays.items():
        expected = torch.tensor(array.astype(np.float32)).to(got[name].dtype)
        assert got[name].shape == array.shape and torch.equal(got[name], expected), name
    assert got["b"].dtype == torch.bfloat16 and got["e"].dtype == torch.float16


def test_facts_come_from_old_and_new_configs_and_all_shards(tmp_path):
    save_file({"x": np.zeros((2, 3), np.float32)}, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({"y": np.zeros((4,), np.float16)}, tmp_path / "model-00002-of-00002.safetensors")
    config = {"hidden_size": 16, "vocab_size": 99, "torch_dtype": "bfloat16", "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    facts = read_facts(tmp_path)
    assert facts.tensors == {"x": (2, 3), "y": (4,)}
    assert (facts.width, facts.vocab, facts.dtype, facts.tied) == (16, 99, "bfloat16", False)
    assert facts.eos_ids == {5, 6}
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "text_config": config}))
    assert (read_facts(tmp_path).dtype, read_facts(tmp_path).width) == ("float32", 16)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 16}))
    with pytest.raises(ValueError, match="lacks vocab_size"):
        read_facts(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        read_facts(tmp_path)
