"""Does a model on eight devices give one device's numbers, with each device reading and holding its share only?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from models_reference import reference, save

from kdjax.models import hf_tensors, init_model, load_model, state_shardings, teacher_head
from kdjax.models.checkpoint import Checkpoint
from kdjax.sharding import BATCH_AXES, make_mesh

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 64, (8, 16)).astype(np.int32)
SEGMENTS = np.sort(RNG.integers(0, 4, (8, 16)), axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(reference("qwen3", **SIZES), tmp_path_factory.mktemp("model"))


def loss_and_gradient(model, tokens, segments):
    graph, state = nnx.split(model)

    def loss(state):
        model = nnx.merge(graph, state)
        return jnp.mean(jax.nn.logsumexp(model.logits(model(tokens, segment_ids=segments)), -1))

    return jax.jit(jax.value_and_grad(loss))(state)


@pytest.fixture(scope="module")
def single(folder):
    return loss_and_gradient(load_model(folder), TOKENS, SEGMENTS)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_eight_devices_equal_one(folder, single, shape):
    mesh = make_mesh(*shape)
    model = load_model(folder, mesh=mesh)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P(BATCH_AXES)))  # noqa: E731
    with jax.set_mesh(mesh):
        loss, gradient = loss_and_gradient(model, place(TOKENS), place(SEGMENTS))
    assert abs(float(loss) - float(single[0])) < 1e-5
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(single[1]), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()), err_msg=str(path))


@pytest.mark.parametrize(("shape", "split"), [((1, 8, 1), 8), ((2, 2, 2), 4), ((8, 1, 1), 1)], ids=str)
def test_each_device_holds_its_share(folder, shape, split):
    model = load_model(folder, mesh=make_mesh(*shape))
    held = dict.fromkeys(jax.devices(), 0)
    whole, norms = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
        whole += leaf.nbytes
        norms += leaf.nbytes if "norm" in str(path) else 0
    assert norms < 0.02 * whole  # norms are kept whole everywhere
    assert set(held.values()) == {(whole - norms) // split + norms}


def test_heads_that_do_not_divide_stay_whole(folder):
    model = load_model(folder, mesh=make_mesh(1, 2, 4))  # 2 kv heads on 4 tensor devices
    assert model.layers.attention.k.weight[...].sharding.spec == P(None, None, None, "fsdp")
    assert model.layers.attention.q.weight[...].sharding.spec == P(None, "tensor", None, "fsdp")


def test_slices_are_read_once_and_no_larger_than_needed(folder, monkeypatch):
    original, read, largest = Checkpoint.read, [], []

    def counted(self, name, index=None):
        value = original(self, name, index)
        read.append(value.nbytes)
        largest.append(value.nbytes / np.prod(self.entries[name].shape) / 4)
        return value

    monkeypatch.setattr(Checkpoint, "read", counted)
    model = load_model(folder, mesh=make_mesh(2, 2, 2))
    assert sum(read) == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert sorted(set(largest)) == [0.25, 1.0]  # quarters of matrices, whole norms


def test_random_weights_do_not_depend_on_the_mesh(folder):
    config = load_model(folder, abstract=True).config
    alone, meshed = init_model(config, seed=5), init_model(config, mesh=make_mesh(2, 2, 2), seed=5)
    wanted = jax.tree.leaves(state_shardings(meshed, make_mesh(2, 2, 2)))
    for one, many, where in zip(
        jax.tree.leaves(nnx.state(alone)), jax.tree.leaves(nnx.state(meshed)), wanted, strict=True
    ):
        assert np.array_equal(one, many) and many.sharding == where


def test_sharded_parameters_export_whole(folder):
    plain, meshed = load_model(folder), load_model(folder, mesh=make_mesh(1, 2, 4))
    for (name, one), (_, many) in zip(hf_tensors(plain), hf_tensors(meshed), strict=True):
        assert np.array_equal(one, many), name


def test_heads_and_abstract_models_know_their_shardings(folder):
    mesh = make_mesh(1, 2, 4)
    head = teacher_head(folder, mesh=mesh)
    assert head.weight.sharding.spec == P("tensor", "fsdp")
    abstract = load_model(folder, mesh=mesh, abstract=True)
    for one, many in zip(
        jax.tree.leaves(nnx.state(abstract)), jax.tree.leaves(nnx.state(load_model(folder, mesh=mesh))), strict=True
    ):
        assert (one.shape, one.dtype, one.sharding) == (many.shape, many.dtype, many.sharding)


def test_weights_survive_donation(folder):
    """On a CPU JAX may keep pointing at the arrays a loader hands over; replicas must not share one that is reused."""
    model = load_model(folder, mesh=make_mesh(8, 1, 1))
    expected = {name: np.array(value) for name, value in hf_tensors(model)}
    graph, state = nnx.split(model)
    double = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), donate_argnums=0)
    for name, value in hf_tensors(nnx.merge(graph, double(state))):
        for shard in value.addressable_shards:
            assert np.array_equal(shard.data, 2 * expected[name]), name
