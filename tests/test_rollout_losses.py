"""Losses of sampled tokens: against float64 NumPy, and their expected gradients by enumerating a small vocabulary."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import backend
from kdjax.losses import Head, chunks, find_divergence, linear_rows
from kdjax.losses.rollouts import OVERLAP, DivergenceOnRollouts, PolicyGradient, Sampled

N, D, E, V = 23, 6, 5, 17


def rows(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.normal(size=(N, D)),
        "head": rng.normal(size=(D, V)),
        "teacher_hidden": rng.normal(size=(N, E)),
        "teacher_head": rng.normal(size=(E, V)),
        "labels": rng.integers(0, V, N),
        "mask": rng.random(N) < 0.8,
        "on_policy": (rng.random(N) < 0.6).astype(float),
        "behaviour_logprobs": -rng.random(N) * 4,
        "advantage": rng.normal(size=N),
    }


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def evaluate(values, r, **options):
    """total, values by row, and the total's gradients in hidden rows and head"""
    f32 = {name: jnp.asarray(x, jnp.float32) for name, x in r.items()}
    known = {name: f32[name] for name in ("on_policy", "behaviour_logprobs", "advantage")}
    known["labels"] = jnp.asarray(r["labels"], jnp.int32)

    def total(hidden, head):
        sides = hidden, Head(head), f32["teacher_hidden"], Head(f32["teacher_head"])
        return linear_rows(values, *sides, rows=known, mask=jnp.asarray(r["mask"]), **options)

    (value, by_row), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(f32["hidden"], f32["head"])
    return value, by_row, grads


def reference(r, signal, temperature, clip, kd_ratio):
    """float64: the loss of each row, its slope in the student's logits, and what is watched"""
    z, t = r["hidden"] @ r["head"], r["teacher_hidden"] @ r["teacher_head"]
    at = np.arange(N), r["labels"]
    log_q, log_p = log_softmax(z / temperature), log_softmax(t / temperature)
    lq, lp, on, a = log_q[at], log_p[at], r["on_policy"], r["advantage"]
    gap = np.where(on > 0, lq - r["behaviour_logprobs"], 0)
    w = np.ones(N) if clip is None else np.minimum(np.exp(gap), clip)
    hot = np.eye(V)[r["labels"]]
    slope_lq = (hot - np.exp(log_q)) / temperature
    ratio = np.exp(lp - lq)
    kd = {"advantage": -(lp - lq) * lq, "k2": 0.5 * (lp - lq) ** 2, "k3": ratio - 1 - (lp - lq)}[signal]
    inner = {"advantage": -(lp - lq), "k2": lq - lp, "k3": 1 - ratio}[signal]
    plain = log_softmax(z)
    loss = kd_ratio * on * w * (kd - a * lq) + (1 - kd_ratio) * (1 - on) * -plain[at]
    slope = (kd_ratio * on * w * (inner - a))[:, None] * slope_lq
    slope += ((1 - kd_ratio) * (1 - on))[:, None] * (np.exp(plain) - hot)
    watched = {
        "k3": np.exp(gap) - 1 - gap,
        "log_ratio": np.where(on > 0, lq - lp, 0),
        "entropy": -(np.exp(log_q) * log_q).sum(-1),
        "overlap": [
            len({*np.argsort(-x)[:OVERLAP]} & {*np.argsort(-y)[:OVERLAP]}) / OVERLAP for x, y in zip(z, t, strict=True)
        ],
        "weight": w,
    }
    return loss, slope, watched


@pytest.mark.parametrize(
    ("signal", "temperature", "clip", "kd_ratio"),
    [("advantage", 1.0, None, 1.0), ("k2", 0.7, 1.5, 0.6), ("k3", 1.3, 2.0, 0.8), ("advantage", 2.0, 1.0, 0.3)],
)
def test_values_and_gradients_are_those_of_float64(signal, temperature, clip, kd_ratio):
    r = rows()
    total, by_row, grads = evaluate(PolicyGradient(signal, kd_ratio, Sampled(temperature, clip)), r, chunk_rows=7)
    loss, slope, watched = reference(r, signal, temperature, clip, kd_ratio)
    mask = r["mask"]
    assert float(total) == pytest.approx(loss[mask].sum(), rel=1e-5)
    np.testing.assert_allclose(by_row["loss"], np.where(mask, loss, 0), atol=1e-5)
    for name, expected in watched.items():
        np.testing.assert_allclose(by_row[name], np.where(mask, expected, 0), atol=2e-5, err_msg=name)
    slope = slope * mask[:, None]
    np.testing.assert_allclose(grads[0], slope @ r["head"].T, atol=1e-4)
    np.testing.assert_allclose(grads[1], r["hidden"].T @ slope, atol=1e-4)


def test_by_row_as_on_a_gpu(monkeypatch):
    """Two chunks a group: values keep their rows' order over groups, chunks and blocks."""
    expected = evaluate(PolicyGradient("k3", 0.7, Sampled(1.2, 2.0)), rows(), chunk_rows=23)
    monkeypatch.setattr(backend, "on_cpu", lambda: False)
    monkeypatch.setattr(chunks, "_group_chunks", lambda chunk, hidden: 2)
    monkeypatch.setattr(chunks, "_block_rows", lambda columns: 2)
    found = evaluate(PolicyGradient("k3", 0.7, Sampled(1.2, 2.0)), rows(), chunk_rows=5)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def brier(student_logits, teacher_logits, *, temperature=1.0):
    """one's own: the squared distance of the two distributions"""
    q, p = (jax.nn.softmax(logits / temperature) for logits in (student_logits, teacher_logits))
    return jnp.square(q - p).sum(-1)


@pytest.mark.parametrize(
    ("divergence", "of"),
    [
        ("rkl", lambda q, p: (q * np.log(q / p), np.log(q / p))),
        (brier, lambda q, p: ((q - p) ** 2, 2 * (q - p))),
    ],
)
def test_a_divergence_falls_on_every_row_and_cross_entropy_on_the_data_alone(divergence, of):
    """of: the divergence's terms, and its slope in q up to a constant"""
    r = rows(1)
    divergence = find_divergence(divergence)
    values = DivergenceOnRollouts(divergence, (("temperature", 1.0),), 0.6, Sampled(1.0, 2.0))
    total, by_row, grads = evaluate(values, r)
    z, t = r["hidden"] @ r["head"], r["teacher_hidden"] @ r["teacher_head"]
    log_q, log_p = log_softmax(z), log_softmax(t)
    q = np.exp(log_q)
    terms, in_q = of(q, np.exp(log_p))
    kd = terms.sum(-1)
    gap = log_q[np.arange(N), r["labels"]] - r["behaviour_logprobs"]
    w = np.where(r["on_policy"] > 0, np.minimum(np.exp(gap), 2.0), 1.0)
    ce_share = 0.4 * (1 - r["on_policy"])
    loss = 0.6 * w * kd - ce_share * log_q[np.arange(N), r["labels"]]
    assert float(total) == pytest.approx(loss[r["mask"]].sum(), rel=1e-5)
    np.testing.assert_allclose(by_row["kd"], np.where(r["mask"], kd, 0), atol=1e-5)
    slope = (0.6 * w)[:, None] * q * (in_q - (q * in_q).sum(-1, keepdims=True)) + ce_share[:, None] * (
        q - np.eye(V)[r["labels"]]
    )
    slope *= r["mask"][:, None]
    np.testing.assert_allclose(grads[0], slope @ r["head"].T, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("signal", ["advantage", "k2", "k3"])
def test_the_expected_gradient_is_that_of_the_divergence(signal, temperature):
    """A row for each token of the vocabulary, weighted by its probability: the expectation without any sampling."""
    rng = np.random.default_rng(3)
    z, t = rng.normal(size=V), rng.normal(size=V)
    q, p = np.exp(log_softmax(z / temperature)), np.exp(log_softmax(t / temperature))
    known = {
        "labels": jnp.arange(V),
        "on_policy": jnp.ones(V),
        "behaviour_logprobs": jnp.asarray(np.log(q), jnp.float32),
    }

    def total(hidden):  # the hidden rows are the logits themselves
        logits = jnp.broadcast_to(jnp.asarray(t, jnp.float32), (V, V))
        values = PolicyGradient(signal, 1.0, Sampled(temperature))
        return linear_rows(values, hidden, jnp.eye(V), logits, jnp.eye(V), rows=known, mask=jnp.ones(V, bool))[0]

    slopes = np.asarray(jax.grad(total)(jnp.broadcast_to(jnp.asarray(z, jnp.float32), (V, V))))  # [token, V]
    expected = (q[:, None] * slopes).sum(0)
    log_ratio = np.log(q) - np.log(p)
    reverse = q * (log_ratio - (q * log_ratio).sum()) / temperature
    forward = (q - p) / temperature
    np.testing.assert_allclose(expected, forward if signal == "k3" else reverse, atol=2e-6)
    assert np.abs(forward - reverse).max() > 1e-2  # the two are told apart


def test_the_example_gives_each_kind_of_row_its_own_divergence(root):
    spec = importlib.util.spec_from_file_location("own_rollouts", root / "examples" / "own_rollout_algorithm.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    r = rows(5)
    total, by_row, grads = evaluate(example.KindValues(0.6, Sampled(1.3, 2.0)), r)
    z, t = r["hidden"] @ r["head"], r["teacher_hidden"] @ r["teacher_head"]
    log_q, log_p, tempered, at = log_softmax(z), log_softmax(t), log_softmax(z / 1.3), (np.arange(N), r["labels"])
    q, p, on = np.exp(log_q), np.exp(log_p), r["on_policy"]
    reverse = (q * (log_q - log_p)).sum(-1)
    kd = np.where(on > 0, reverse, (p * (log_p - log_q)).sum(-1))
    w = np.where(on > 0, np.minimum(np.exp(tempered[at] - r["behaviour_logprobs"]), 2.0), 1.0)
    loss = 0.6 * w * (kd - on * r["advantage"] * tempered[at]) - 0.4 * (1 - on) * log_q[at]
    assert float(total) == pytest.approx(loss[r["mask"]].sum(), rel=1e-5)
    np.testing.assert_allclose(by_row["kd"], np.where(r["mask"], kd, 0), atol=1e-5)
    hot, on = np.eye(V)[r["labels"]], on[:, None]
    slope_kd = np.where(on > 0, q * (log_q - log_p - reverse[:, None]), q - p)
    slope_reward = on * r["advantage"][:, None] * (hot - np.exp(tempered)) / 1.3
    slope = 0.6 * w[:, None] * (slope_kd - slope_reward) + 0.4 * (1 - on) * (q - hot)
    np.testing.assert_allclose(grads[0], (slope * r["mask"][:, None]) @ r["head"].T, atol=1e-4)


def test_a_mesh_changes_nothing():
    from kdjax.sharding import make_mesh

    r = rows(2)
    values = PolicyGradient("k2", 0.7, Sampled(0.9, 1.5))
    alone = evaluate(values, r)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        split = jax.jit(lambda: evaluate(values, r))()
    assert float(split[0]) == pytest.approx(float(alone[0]), rel=1e-5)
    for name, expected in alone[1].items():
        np.testing.assert_allclose(np.asarray(split[1][name]), expected, atol=1e-5, err_msg=name)
    for ours, expected in zip(split[2], alone[2], strict=True):
        np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4)


def test_a_token_that_the_teacher_does_not_know_says_nothing():
    r = rows(4)
    valid = np.ones(V, bool)
    valid[r["labels"][0]] = False
    f32 = {name: jnp.asarray(x, jnp.float32) for name, x in r.items()}
    known = {"labels": jnp.asarray(r["labels"], jnp.int32), "on_policy": jnp.ones(N)}
    known["behaviour_logprobs"] = f32["behaviour_logprobs"]
    teacher = Head(f32["teacher_head"], valid=jnp.asarray(valid))
    values = PolicyGradient("advantage", 1.0, Sampled())
    _, by_row = linear_rows(
        values, f32["hidden"], f32["head"], f32["teacher_hidden"], teacher, rows=known, mask=jnp.ones(N, bool)
    )
    unknown = r["labels"] == r["labels"][0]
    assert (np.asarray(by_row["kd"])[unknown] == 0).all() and (np.asarray(by_row["kd"])[~unknown] != 0).all()
