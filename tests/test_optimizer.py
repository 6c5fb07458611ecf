"""Schedule, clipping and decay against what they promise."""

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import TrainConfig
from kdjax.training.optimizer import decayed, make_optimizer, make_schedule


def test_cosine_with_warm_up_and_minimum():
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_ratio=0.1)
    rates = np.array([float(make_schedule(config, 100)(i)) for i in range(100)])
    assert rates[0] == pytest.approx(1 / 11)  # not zero: the first step counts
    assert rates[10] == pytest.approx(1.0) and rates.argmax() == 10
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert rates[99] == pytest.approx(0.1)


@pytest.mark.parametrize(("schedule", "last"), [("linear", 0.2), ("constant", 1.0)])
def test_other_schedules(schedule, last):
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_ratio=0.0, schedule=schedule)
    assert float(make_schedule(config, 50)(0)) == pytest.approx(1.0)
    assert float(make_schedule(config, 50)(49)) == pytest.approx(last)


def test_adamw_step_by_hand():
    config = TrainConfig(
        learning_rate=0.1, warmup_ratio=0.0, schedule="constant", weight_decay=0.5, betas=(0.9, 0.98), eps=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    params = {"student": {"w": jnp.array([2.0, -1.0]), "norm": jnp.array([1.0])}, "extra": {"p": jnp.array([1.0])}}
    grads = {"student": {"w": jnp.array([6.0, 0.0]), "norm": jnp.array([0.0])}, "extra": {"p": jnp.array([8.0])}}
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # The gradient, clipped from norm 10 to 1, is 0.6 and 0.8; the first Adam update of g is g / (|g| + eps).
    assert np.allclose(updates["student"]["w"], [-0.1 * (0.6 / 1.6 + 0.5 * 2.0), -0.1 * 0.5 * -1.0], atol=1e-6)
    assert np.allclose(updates["student"]["norm"], 0.0)  # no decay on norms
    assert np.allclose(updates["extra"]["p"], -0.1 * (0.8 / 1.8 + 0.5), atol=1e-6)


def test_decay_spares_norms_and_biases():
    tree = {"layers": {"attention_norm": {"weight": 1}, "q": {"weight": 1, "bias": 1}}, "norm": {"weight": 1}}
    assert decayed(tree) == {
        "layers": {"attention_norm": {"weight": False}, "q": {"weight": True, "bias": False}},
        "norm": {"weight": False},
    }
