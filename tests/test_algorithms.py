"""Built-in algorithms beside vanilla, and what is said of impossible ones."""

import numpy as np
import optax
import pytest
from flax import nnx
from step_tools import E, config, host_batch, make, parameters, run

from kdjax.algorithms import Feature, Vanilla, check_names, make_algorithm, register_algorithm
from kdjax.errors import UserError
from kdjax.training.step import Step


def test_feature_loss_against_numpy_and_its_projection_learns():
    step = make(distill={"algorithm": "feature", "kd_ratio": 1.0, "algorithm_args": {"feature_layer": 1}})
    batch = host_batch(0)
    _, (inner,) = step.model(batch.tokens[0], batch.positions[0], batch.segment_ids[0], hidden_layers=(1,))
    inner = np.asarray(inner, np.float64).reshape(-1, inner.shape[-1])[batch.rows[0, 0]]
    projection = np.asarray(step.algorithm.projection[...], np.float64)
    unit = lambda x: x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)  # noqa: E731
    distance = ((unit(inner @ projection) - unit(batch.teacher_hidden[0][0].astype(np.float64))) ** 2).sum(-1)
    expected = distance[batch.mask[0]].mean()
    before = parameters(step)
    metrics = run(step, 3)
    assert metrics[0]["feature"] == pytest.approx(expected, rel=1e-5)
    assert metrics[0]["loss"] == pytest.approx(metrics[0]["objective"] + metrics[0]["feature"], rel=1e-5)
    moved = parameters(step)["['extra']['projection'].value"] - before["['extra']['projection'].value"]
    assert moved.shape == (32, E) and np.abs(moved).max() > 0


def test_an_algorithm_in_a_file_trains(root):
    step = make(distill={"algorithm": f"{root}/examples/own_algorithm.py:WithFeatures"})
    losses = [m["loss"] for m in run(step, 12)]
    assert np.isfinite(losses).all() and np.mean(losses[-4:]) < np.mean(losses[:4])


def test_an_algorithm_that_keeps_random_numbers_is_refused():
    """they would be no part of the state: the same at every step, and not saved"""

    class Noisy(nnx.Module):
        def __init__(self):
            self.noise = nnx.Dropout(0.1, rngs=nnx.Rngs(0))

    with pytest.raises(UserError, match="distill.algorithm: Noisy keeps random numbers"):
        Step(make().model, Noisy(), optax.sgd(0.1))


def test_a_loss_in_a_file_trains(root):
    step = make(distill={"loss": f"{root}/examples/five_line_loss.py:power", "kd_ratio": 1.0})
    losses = [m["kd"] for m in run(step, 12)]
    assert np.isfinite(losses).all() and np.mean(losses[-4:]) < np.mean(losses[:4])


def test_without_a_teacher_every_algorithm_is_sft():
    settings = config()
    step = make()
    assert type(make_algorithm(settings, step.model)).__name__ == "SFT"


@pytest.mark.parametrize(
    ("distill", "words"),
    [
        ({"algorithm": "vanila"}, ["distill.algorithm", "vanilla"]),
        ({"loss": "kll"}, ["distill.loss", "'kl'"]),
        ({"loss": "jsd", "loss_args": {"jsd_beta": 1.5}}, ["jsd_beta", "1.5"]),
        ({"loss": "kl", "loss_args": {"beta": 1.5}}, ["kl", "beta"]),
        ({"algorithm": "feature", "algorithm_args": {"layer": 1}}, ["feature_layer", "not layer"]),
        ({"algorithm": "vanilla", "algorithm_args": {"signal": 1}}, ["vanilla takes none, not signal"]),
        ({"algorithm": "sft", "algorithm_args": {"signal": 1}}, ["sft takes none, not signal"]),
        ({"algorithm": "policy_gradient", "algorithm_args": {"sign": 1}}, ["takes signal, not sign"]),
    ],
)
def test_impossible_choices_are_one_line(distill, words):
    with pytest.raises(UserError) as error:
        check_names(config(distill=distill))
        run(make(distill=distill), 1)  # what a loss says of its values
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["feature", "sft"])
def test_what_cannot_learn_from_rollouts_is_refused_before_anything_loads(name):
    followed = {"distill": {"algorithm": name, "on_policy_fraction": 0.5}, "teacher": {"path": "none"}}
    with pytest.raises(UserError, match=f"distill.algorithm={name} does not learn from rollouts") as error:
        check_names(config(**followed))
    assert "\n" not in str(error.value) and "on_policy_fraction=0" in str(error.value)
    check_names(config(**followed | {"distill": {"algorithm": name}}))
    check_names(config(**followed | {"distill": {"algorithm": "vanilla", "on_policy_fraction": 0.5}}))


def test_what_inherits_from_one_that_cannot_may_learn_from_rollouts():
    @register_algorithm("features of rollouts")
    class OfRollouts(Feature):
        pass

    distill = {"algorithm": "features of rollouts", "on_policy_fraction": 1.0}
    check_names(config(distill=distill, teacher={"path": "none"}))


def test_an_algorithm_of_ones_own_takes_what_it_says():
    @register_algorithm("takes a word")
    class Takes(Vanilla):
        arguments = ("word",)

    @register_algorithm("looks itself")
    class LooksItself(Vanilla):  # what Vanilla takes is not what this takes
        pass

    check_names(config(distill={"algorithm": "takes a word", "algorithm_args": {"word": 1}}))
    check_names(config(distill={"algorithm": "looks itself", "algorithm_args": {"anything": 1}}))
    with pytest.raises(UserError, match="takes a word takes word, not wrd"):
        check_names(config(distill={"algorithm": "takes a word", "algorithm_args": {"wrd": 1}}))
