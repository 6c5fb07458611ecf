"""The step: the right loss, the same however it is cut up, and nothing that depends on chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from step_tools import SHAPE, S, close, config, documents, host_batch, make, parameters, run, teacher

from kdjax.models import load_model
from kdjax.training.sources import to_device


def test_loss_is_sum_over_all_positions_divided_once():
    """Against float64 NumPy, document by document: Σ over positions / number of positions, not a mean of means.

    The gradient's norm before clipping is held against ``jax.grad`` of the plain loss.
    """
    step = make(distill={"kd_ratio": 0.3}, train={"max_grad_norm": 0.01})
    model, head = step.model, np.asarray(teacher().head.weight, np.float64)
    gradient = jax.tree.leaves(jax.jit(jax.grad(plain_loss))(nnx.state(model, nnx.Param), nnx.graphdef(model)))
    kd, ce, count = 0.0, 0.0, 0
    for i, document in enumerate(documents(0)):
        tokens = np.zeros((1, S), np.int32)
        tokens[0, : len(document)] = document.ids
        logits = np.asarray(model.logits(model(tokens)), np.float64)[0]
        states = np.random.default_rng([0, i]).normal(size=(len(document), 24)).astype(np.float32)
        for t in range(len(document) - 1):
            if document.loss[t + 1]:
                log_q = logits[t] - np.logaddexp.reduce(logits[t])
                target = states[t].astype(np.float64) @ head.T
                log_p = target - np.logaddexp.reduce(target)
                kd += float(np.exp(log_p) @ (log_p - log_q))
                ce -= log_q[document.ids[t + 1]]
                count += 1
    foretold = step.reports(to_device(host_batch(0), step.mesh))
    metrics = run(step, 1)[0]
    assert foretold == set(metrics) and metrics["loss_tokens"] == count
    assert metrics["kd"] == pytest.approx(kd / count, rel=1e-5)
    assert metrics["ce"] == pytest.approx(ce / count, rel=1e-5)
    assert metrics["loss"] == pytest.approx((0.7 * ce + 0.3 * kd) / count, rel=1e-5)
    norm = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in gradient))
    assert norm > 0.1 and metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)  # as it is before clipping


def plain_loss(params, graph):
    """0.7 CE + 0.3 KL over whole logits, a document a row"""
    made, length = documents(0), 16
    tokens, keep, states = np.zeros((14, length), np.int32), np.zeros((14, length), bool), np.zeros((14, length, 24))
    for i, document in enumerate(made):
        tokens[i, : len(document)] = document.ids
        keep[i, : len(document) - 1] = document.loss[1:]
        states[i, : len(document)] = np.random.default_rng([0, i]).normal(size=(len(document), 24))
    model = nnx.merge(graph, params)
    log_q = jax.nn.log_softmax(model.logits(model(tokens)))
    log_p = jax.nn.log_softmax(states.astype(np.float32) @ teacher().head.weight.T)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    ce = -jnp.take_along_axis(log_q, jnp.roll(tokens, -1, axis=1)[..., None], axis=-1)[..., 0]
    return jnp.where(keep, 0.7 * ce + 0.3 * kl, 0.0).sum() / keep.sum()


def test_accumulating_four_equals_one():
    one, four = make(), make()
    first, second = run(one, 3), run(four, 3, accumulate=4)
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    close(parameters(one), parameters(four), 1e-5)


def test_weights_move_only_where_they_should():
    step = make()
    before = parameters(step)
    frozen = np.asarray(jax.tree.leaves(step._frozen)[0])
    run(step, 1)
    after = parameters(step)
    assert all(np.abs(after[name] - before[name]).max() > 0 for name in before)
    assert np.array_equal(frozen, np.asarray(jax.tree.leaves(step._frozen)[0]))
    # The model in the researcher's hands is the trained one, although the state was donated.
    assert np.array_equal(np.asarray(step.model.embed.weight[...]), after["['student']['embed']['weight'].value"])


@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_remat_changes_nothing(remat):
    plain, again = make(), make(student={"remat": remat})
    for a, b in zip(run(plain, 2), run(again, 2), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_seeds_decide_everything():
    first, second, other = make(), make(), make(train={"seed": 1})
    run(first, 2), run(second, 2), run(other, 2)
    a, b, c = parameters(first), parameters(second), parameters(other)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(not np.array_equal(a[name], c[name]) for name in a)


def test_bfloat16_compute_drifts_little_from_float32():
    """Over 50 steps the loss stays within 2 % of float32's, and the float32 masters are kept."""
    wide, narrow = make(), make(student={"dtype": "bfloat16", "param_dtype": "float32"})
    a = np.array([m["loss"] for m in run(wide, 50)])
    b = np.array([m["loss"] for m in run(narrow, 50)])
    assert {x.dtype for x in jax.tree.leaves(narrow.state["params"])} == {np.dtype(np.float32)}
    assert np.abs(a - b).max() <= 0.02 * np.abs(a).max()
    assert a[-10:].mean() < 0.95 * a[:10].mean()


def test_nothing_recompiles_over_an_epoch_of_a_stream(root):
    """GSM8K, batches of ragged documents with many or few loss tokens: the first step's program serves them all."""
    from kdjax.algorithms import make_algorithm
    from kdjax.data import DataStream, load_tokenizer
    from kdjax.training.optimizer import make_optimizer
    from kdjax.training.step import make_step

    gsm8k = {"path": str(root / "examples" / "data" / "gsm8k_test.jsonl"), "format": "prompt_response",
             "prompt_key": "question", "response_key": "answer", "max_samples": 400}  # fmt: skip
    settings = config(data={"train": [gsm8k], "max_len": 512})
    model = load_model(None, config=SHAPE | {"vocab_size": 4096, "max_position_embeddings": 512}, init="random")
    step = make_step(model, make_algorithm(settings, model), make_optimizer(settings.train, 60))
    batches = list(DataStream(settings.data, load_tokenizer(root / "examples" / "tokenizer"), batch=2, epochs=1))
    assert len(batches) > 30 and max(b.loss_tokens for b in batches) > 1.2 * min(b.loss_tokens for b in batches)
    place = lambda host: to_device(host.batch, step.mesh)  # noqa: E731
    step(place(batches[0]))
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for host in batches[1:]:
            step(place(host))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []


def test_all_masked_batch_changes_only_by_decay():
    """No position carries loss: loss and gradient are exactly zero, nothing is divided by zero."""
    from dataclasses import replace

    step = make(train={"weight_decay": 0.0})
    before = parameters(step)
    batch = host_batch(0)
    metrics = step(to_device(replace(batch, mask=np.zeros_like(batch.mask)), step.mesh))
    assert float(metrics["loss"]) == 0.0 and float(metrics["grad_norm"]) == 0.0
    after = parameters(step)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_layers_of_the_teacher_as_a_student(tmp_path):
    from step_tools import SHAPE

    from kdjax.models import export_hf

    big = load_model(None, config=SHAPE | {"num_hidden_layers": 4}, init="random", seed=3)
    export_hf(big, tmp_path / "teacher")
    cut = load_model(tmp_path / "teacher", init=(0, 3))
    stacked = np.asarray(big.layers.attention.q.weight[...])
    assert np.array_equal(np.asarray(cut.layers.attention.q.weight[...]), stacked[[0, 3]])
    assert np.array_equal(np.asarray(cut.embed.weight[...]), np.asarray(big.embed.weight[...]))
