"""Are the decoders' logits and gradients those of transformers, padded, packed, in bfloat16 and under remat?"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from models_reference import FAMILIES, logits, reference, save
from transformers import AutoModelForCausalLM

from kdjax import backend
from kdjax.errors import UserError
from kdjax.models import hf_tensors, load_model
from kdjax.models.attention import causal_attention
from kdjax.models.decoder import REMAT

pytestmark = pytest.mark.usefixtures("optimized")

TOKENS = np.random.default_rng(0).integers(0, 61, (3, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model and the folder it was saved to, by family, made once."""
    made = {}

    def get(name):
        if name not in made:
            model = reference(name)
            made[name] = model, save(model, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def run(model, *args, **kwargs):
    """One compilation instead of one an operation."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state: _logits(nnx.merge(graph, state), *args, **kwargs))(state)


def _logits(model, *args, **kwargs):
    return model.logits(model(*args, **kwargs))


@pytest.mark.parametrize("segments", [None, np.array([[1, 1, 2, 2, 0]])])
def test_what_cudnn_is_asked_for(monkeypatch, segments):
    """a GPU's kernel: causality is its own, and only segments reach it as a mask"""
    asked = []

    def kernel(*args, **options):
        asked.append((args, options))
        return args[0]

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    given = tuple(jnp.zeros((1, 5, heads, 4), jnp.bfloat16) for heads in (2, 1, 1))
    causal_attention(*given, segments, implementation="cudnn")
    ((args, options),) = asked
    mask = options.pop("mask")
    assert all(a is b for a, b in zip(args, given, strict=True)) and options == {
        "is_causal": True,
        "implementation": "cudnn",
    }
    apart = None if segments is None else (segments[0] == segments[0][:, None])[None, None].tolist()
    assert (None if mask is None else mask.tolist()) == apart


def dense_attention(q, k, v, slope, segments):
    """Outputs and the gradients of q, k and v in float64, from all scores."""
    groups = q.shape[2] // k.shape[2]
    q, k, v, slope = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, slope))
    kv_heads, (k, v) = k.shape[1], (x.repeat(groups, axis=1) for x in (k, v))
    seen = np.tri(q.shape[2], dtype=bool) & (segments[:, None, :, None] == segments[:, None, None])
    scores = np.where(seen, q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = slope @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / q.shape[-1] ** 0.5
    shared = [
        x.reshape(len(x), kv_heads, groups, *x.shape[2:]).sum(2)
        for x in (ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ slope)
    ]
    return [x.swapaxes(1, 2) for x in (p @ v, ds @ k, *shared)]


@pytest.mark.parametrize(
    ("length", "dtype"), [(1, "float32"), (64, "float32"), (65, "float32"), (530, "float32"), (200, "bfloat16")]
)
def test_attention_and_its_gradient(length, dtype):
    """against float64, in one block of queries and in several, in whole ones and ragged ones"""
    rng = np.random.default_rng(length)
    q, k, v, slope = (jnp.asarray(rng.standard_normal((2, length, heads, 8)), dtype) for heads in (4, 2, 2, 4))
    segments = np.sort(rng.integers(0, 3, (2, length)))[:, ::-1]
    out, pull = jax.vjp(lambda *given: causal_attention(*given, jnp.asarray(segments)), q, k, v)
    found = out, *pull(slope)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    for ours, expected in zip(found, dense_attention(q, k, v, slope, segments), strict=True):
        np.testing.assert_allclose(
            ours, expected, rtol=0, atol=(3e-6 if dtype == "float32" else 2e-2) * max(1, np.abs(expected).max())
        )


def test_attention_keeps_nothing_of_the_size_of_its_scores():
    q, k = jnp.zeros((1, 512, 4, 8)), jnp.zeros((1, 512, 2, 8))
    _, pull = jax.vjp(causal_attention, q, k, k)
    assert sum(x.size for x in jax.tree.leaves(pull)) < 512 * 4 * 8 * 6


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_right_padded(pair, name):
    theirs, folder = pair(name)
    lengths = np.array([20, 13, 1])
    mask = np.arange(20) < lengths[:, None]
    ours = run(load_model(folder), TOKENS, segment_ids=jnp.asarray(mask, jnp.int32))
    assert ours.dtype == jnp.float32 and ours.shape == (3, 20, 61)
    expected = logits(theirs, TOKENS, mask)
    assert np.abs(expected[mask]).max() > 1  # or agreement would mean little
    assert np.abs(np.asarray(ours) - expected)[mask].max() < 1e-4
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("name", ["llama3-rope", "qwen2", "qwen3-tied"])
@pytest.mark.parametrize("given", [True, False], ids=["positions", "no-positions"])
def test_packed_equals_parts_alone(pair, name, given):
    theirs, folder = pair(name)
    parts = [[(0, 7), (7, 8), (8, 18)], [(0, 20)], [(2, 9), (9, 15)]]  # the last row has padding at both ends
    segments, positions = np.zeros((3, 20), np.int32), np.zeros((3, 20), np.int32)
    for row, spans in enumerate(parts):
        for i, (start, stop) in enumerate(spans, 1):
            segments[row, start:stop], positions[row, start:stop] = i, np.arange(stop - start)
    ours = run(load_model(folder), TOKENS, positions if given else None, jnp.asarray(segments))
    assert np.isfinite(ours).all()
    for row, spans in enumerate(parts):
        for start, stop in spans:
            alone = logits(theirs, TOKENS[row : row + 1, start:stop])[0]
            assert np.abs(np.asarray(ours[row, start:stop]) - alone).max() < 1e-4


def test_long_rows_cross_attention_blocks(pair):
    theirs, folder = pair("qwen3")
    tokens = np.random.default_rng(1).integers(0, 61, (1, 300)).astype(np.int32)
    segments = np.repeat([1, 2], [170, 130])[None].astype(np.int32)
    model = load_model(folder)
    whole, packed = run(model, tokens), run(model, tokens, segment_ids=jnp.asarray(segments))
    assert np.abs(np.asarray(whole) - logits(theirs, tokens)).max() < 1e-4
    assert np.abs(np.asarray(packed[:, :170]) - logits(theirs, tokens[:, :170])).max() < 1e-4
    assert np.abs(np.asarray(packed[:, 170:]) - logits(theirs, tokens[:, 170:])).max() < 1e-4


@pytest.mark.parametrize("name", ["llama-biased", "llama3-rope", "qwen2", "qwen3"])
def test_gradients_of_every_parameter(pair, name):
    theirs, folder = pair(name)
    labels, mask = np.roll(TOKENS, -1, 1), np.arange(20) < np.array([19, 12, 1])[:, None]
    theirs.zero_grad()
    out = theirs(torch.tensor(TOKENS).long(), attention_mask=torch.tensor(np.arange(20) < [[20], [13], [2]]).long())
    wrong = torch.nn.functional.cross_entropy(
        out.logits.flatten(0, 1), torch.tensor(labels).long().flatten(), reduction="none"
    )
    (wrong * torch.tensor(mask).flatten()).sum().backward()

    model = load_model(folder)
    graph, state = nnx.split(model)
    segments = jnp.asarray(np.arange(20) < [[20], [13], [2]], jnp.int32)

    @jax.jit
    @jax.grad
    def gradient(state):
        scores = _logits(nnx.merge(graph, state), TOKENS, segment_ids=segments)
        return jnp.sum(-jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], -1)[..., 0] * mask)

    ours = dict(hf_tensors(nnx.merge(graph, gradient(state))))
    expected = {key: value.grad.numpy() for key, value in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert np.linalg.norm(np.asarray(ours[key]) - value) <= 1e-3 * np.linalg.norm(value), key


def test_hidden_states_of_chosen_layers(pair):
    theirs, folder = pair("qwen3")
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS).long(), output_hidden_states=True).hidden_states
    model = load_model(folder)
    hidden, (second, embedded, last) = model(TOKENS, hidden_layers=(2, 0, -1))
    assert np.abs(np.asarray(second) - expected[2].numpy()).max() < 1e-4
    assert np.abs(np.asarray(embedded) - expected[0].numpy()).max() == 0
    assert np.abs(np.asarray(hidden) - expected[3].numpy()).max() < 1e-4  # transformers' last one is after the norm
    assert np.abs(np.asarray(model.norm(last)) - np.asarray(hidden)).max() == 0
    with pytest.raises(UserError, match="hidden_layers: 4 is not in 0 … 3"):
        model(TOKENS, hidden_layers=(4,))


def test_remat_and_unrolling_change_nothing(pair):
    _, folder = pair("qwen3-tied")

    def loss_and_gradient(**options):
        graph, state = nnx.split(load_model(folder, **options))
        return jax.jit(jax.value_and_grad(lambda s: jnp.sum(nnx.merge(graph, s)(TOKENS) ** 2)))(state)

    plain = jax.tree.leaves(loss_and_gradient())
    kinds = [dict(remat=remat) for remat in ("dots", "full", "offload")]
    for options in (*kinds, dict(remat="full", unroll=True), dict(remat="offload", unroll=True)):
        for a, b in zip(plain, jax.tree.leaves(loss_and_gradient(**options)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()), err_msg=str(options))


def test_offloaded_inputs_of_layers_are_all_that_is_kept(pair):
    """Between the passes the residuals are one [B, S, D] a layer, in the host's memory, and what `full` closes over."""
    _, folder = pair("qwen3-tied")

    def stacked(remat):
        model = load_model(folder, remat=remat)
        graph, state = nnx.split(model)
        jaxpr = jax.make_jaxpr(jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(TOKENS) ** 2)))(state)
        forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
        depth, width = model.config.num_hidden_layers, model.config.hidden_size
        return [v.aval for v in forward.outvars if v.aval.shape == (depth, *TOKENS.shape, width)]

    (offloaded,) = stacked("offload")
    (kept,) = stacked("full")
    assert "host" in str(offloaded.memory_space).lower() and "host" not in str(kept.memory_space).lower()
    assert len(stacked("none")) > 1


def test_bfloat16_over_float32_masters(pair):
    theirs, folder = pair("qwen3")
    model = load_model(folder, dtype="bfloat16", param_dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    hidden = model(TOKENS)
    ours = model.logits(hidden)
    assert hidden.dtype == jnp.bfloat16 and ours.dtype == jnp.float32
    expected = logits(theirs, TOKENS)
    rough = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), TOKENS)
    error, theirs_error = np.abs(np.asarray(ours) - expected), np.abs(rough - expected)
    assert 0 < error.mean() < 1.5 * theirs_error.mean()  # as near to float32 as transformers' own bfloat16


@pytest.mark.parametrize("name", ["qwen2", "qwen3-tied"])  # with biases, and with norms of heads
def test_projections_are_narrowed_once_before_the_loop(pair, name, monkeypatch):
    """Where that saves traffic: nothing is cast in the loop, and gradients are those of casts in it but for a rounding
    of each entry to bfloat16, which a GPU does either way."""
    monkeypatch.setattr(backend, "on_cpu", lambda: False)
    _, folder = pair(name)
    graph, state = nnx.split(load_model(folder, dtype="bfloat16", param_dtype="float32", remat="dots"))

    def loss(state):
        return jnp.sum(nnx.merge(graph, state)(TOKENS).astype(jnp.float32) ** 2)

    def traced_and_found():
        jaxpr = jax.make_jaxpr(lambda s: loss(s))(state)
        return str(next(e for e in jaxpr.eqns if e.primitive.name == "scan")), jax.jit(jax.grad(loss))(state)

    once, found = traced_and_found()
    monkeypatch.setattr(backend, "on_cpu", lambda: True)
    each, wanted = traced_and_found()
    weights = r"\w+:bf16\[\d+,\d+\] = convert_element_type"
    assert re.search(weights, each) and not re.search(weights, once)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2**-8)


def test_rotary_angles_stay_float32(pair):
    """In bfloat16 the positions 600 and 601 would be the same number."""
    _, folder = pair("qwen3")
    exact, rough = load_model(folder), load_model(folder, dtype="bfloat16")

    def error(positions):
        return np.abs(np.asarray(exact(TOKENS, positions)) - np.asarray(rough(TOKENS, positions), np.float32)).mean()

    near = jnp.arange(20, dtype=jnp.int32)[None].repeat(3, 0)
    assert error(near + 600) < 1.3 * error(near)


def test_unknown_choices_are_refused(pair):
    _, folder = pair("qwen3")
    for arguments, message in (
        (dict(dtype="float64"), "dtype 'float64' is not one of float32, bfloat16, float16"),
        (dict(remat="some"), "remat 'some' is not one of none, dots, full, offload"),
        (dict(attention="flash"), "attention 'flash' is not one of xla, cudnn"),
        (dict(attention="cudnn"), "attention 'cudnn' needs dtype bfloat16 or float16, got float32"),
        (dict(init="zeros"), "model init: 'zeros' is not 'pretrained', 'random' or a list of layers"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(folder, **arguments)


def test_dots_keep_what_cudnn_attention_comes_to(monkeypatch):
    """Traced as on a GPU: the backward pass has the attention's own kernel, and not its forward one once more."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *args: True)
    q, weight = jnp.zeros((1, 128, 4, 64), jnp.bfloat16), jnp.ones(64, jnp.bfloat16)

    def kernels(remat):
        def layer(x, _):
            return causal_attention(x, x, x, implementation="cudnn") * weight, None

        layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
        grad = jax.grad(lambda x: jax.lax.scan(layer, x, None, length=2)[0].astype(jnp.float32).sum())
        traced = str(jax.make_jaxpr(grad)(q))
        return tuple(traced.count(f"dot_product_attention_{way}_wrapper[") for way in ("fwd", "bwd"))

    assert kernels("dots") == (1, 1)
    assert kernels("full") == (2, 1)
