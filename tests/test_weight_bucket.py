"""Does a bucket of device memory hold what was put in, with one wait a bucketful, and is a sharded model sent whole?

Without a GPU its memory is played by the host's: see ``fake_gpu``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fake_gpu import Mapping, play

import bridge.bucket_tensors
import bridge.weight_sync
from bridge.bucket_tensors import load_bucket
from bridge.weight_sync import DeviceBucket
from kdjax.models import hf_tensors, load_model
from kdjax.rollouts.weights import EngineTensors
from kdjax.sharding import make_mesh


@pytest.fixture
def gpu(monkeypatch):
    for module in (bridge.weight_sync, bridge.bucket_tensors):
        play(monkeypatch, module, ["a", "b"])
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    bridge.bucket_tensors._opened.cache_clear()
    yield waits
    bridge.bucket_tensors._opened.cache_clear()


def test_arrays_cross_a_device_bucket_by_name_and_offset(gpu):
    keys = jax.random.split(jax.random.key(0), 4)
    device = jax.devices()[0]
    arrays = {
        "a": jax.random.normal(keys[0], (3, 5)),
        "b": jax.random.normal(keys[1], (7,), jnp.bfloat16),
        "c": jnp.float32(2.5),
        "d": jax.random.normal(keys[2], (30,), jnp.bfloat16),
        "e": jax.random.normal(keys[3], (4, 6)),
    }
    arrays = {name: jax.device_put(x, device) for name, x in arrays.items()}
    bucket, got, sizes = DeviceBucket(192, 1), {}, []
    for entries in bucket.fill(arrays.items()):
        load_bucket(bucket.spec, entries, lambda tensors: got.update((name, x.clone()) for name, x in tensors))
        sizes.append(len(entries))
    assert bucket.spec.gpu == "b" and bucket.spec.path == "" and Mapping.opened == 1
    assert len(sizes) > 1 and len(gpu) == len(sizes)  # the engine has read before it says so
    expected = [word for size in sizes for word in [*["copy"] * size, "wait"]]
    assert bucket._allocation.log == expected
    for name, x in arrays.items():
        assert str(got[name].dtype) == f"torch.{x.dtype}" and got[name].shape == x.shape, name
        assert np.array_equal(got[name].float().numpy(), np.asarray(x, np.float32)), name
    copies = bucket._allocation.log.count("copy")
    with pytest.raises(ValueError, match="weight big of 256 bytes exceeds the bucket of 192"):
        list(bucket.fill([("small", arrays["b"]), ("big", jnp.zeros(64))]))
    assert len(list(bucket.fill([("c", arrays["c"])]))) == 1
    assert bucket._allocation.log.count("copy") == copies + 1  # and nothing of the update that broke off


def test_a_sharded_model_is_gathered_whole_on_one_device_a_bucket_at_a_time(gpu, monkeypatch):
    shape = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=96, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_act="silu",
        rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = load_model(None, mesh=make_mesh(1, 4, 2), config=shape, init="random")
    tensors = EngineTensors(model, "bfloat16", engine_device="cuda")
    assert tensors.gpu is None  # the student is not on a GPU here
    on_host = dict(tensors)
    assert all(isinstance(x, np.ndarray) for x in on_host.values())
    tensors.gpu = 0
    on_device = dict(tensors)
    assert {next(iter(x.devices())) for x in on_device.values()} == {jax.devices()[0]}
    assert on_device.keys() == on_host.keys() == dict(hf_tensors(model)).keys()
    bucket, got, gathered, whole = DeviceBucket(8192, 0), {}, [], tensors.whole
    monkeypatch.setattr(tensors, "whole", lambda x: gathered.append(x) or whole(x))
    for entries in bucket.fill(tensors):
        assert len(gathered) <= len(got) + len(entries) + 1  # of what the bucket has no room for, one tensor at most
        load_bucket(bucket.spec, entries, lambda found: got.update((name, x.clone()) for name, x in found))
    compiled = []
    listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        again = EngineTensors(model, "bfloat16", engine_device="cuda")
        again.gpu = 0
        assert dict(again).keys() == on_host.keys() and not compiled  # only the first sync of a run does
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    for name, x in on_host.items():
        assert np.array_equal(got[name].view(torch.int16).numpy(), x.view(np.int16)), name
