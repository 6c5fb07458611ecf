"""Runs that learn from what the student writes: to the bit, resumed, mixed, stale, and with engines that die."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from bridge.errors import EngineError
from kdjax.config import from_dict
from kdjax.errors import UserError
from kdjax.models import load_model
from kdjax.progress import Display
from kdjax.rollouts.engines import StudentEngines
from kdjax.training.loop import train
from kdjax.training.metrics import read_metrics
from kdjax.training.step import Step

pytestmark = pytest.mark.usefixtures("devices_as_asked", "local_engines")


class Lines(Display):
    """Keeps what a person would see."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def line(self, text):
        self.lines.append(text)


def go(values, display=None, **changes):
    return train(from_dict({**values, **changes}), display or Display(quiet=True))


def metrics(folder, key="loss"):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def rollouts(folder, number):
    lines = (folder / "rollouts" / f"step_{number:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_the_student_learns_from_its_own_words(on_policy_values, tmp_path):
    on_policy_values["train"]["steps"] = 12
    go(on_policy_values)
    run = tmp_path / "run"
    assert len(metrics(run)) == 12 and np.mean(metrics(run, "kd")[-3:]) < np.mean(metrics(run, "kd")[:3])
    assert max(metrics(run, "rollout/k3")) < 1e-6  # float32 on both sides
    assert metrics(run, "rollout/staleness") == [0.0] * 12
    assert len(metrics(run, "rollout/entropy")) == len(metrics(run, "rollout/overlap")) == 12
    assert 0 < min(metrics(run, "rollout/entropy")) and 0 <= min(metrics(run, "rollout/overlap"))
    assert max(metrics(run, "rollout/overlap")) <= 1
    assert max(metrics(run, "rollout/hidden")) < 0.05  # in turn: nothing is hidden behind training
    for number, kl in zip(range(1, 13), metrics(run, "rollout/kl"), strict=True):
        written = rollouts(run, number)
        assert {r["version"] for r in written} == {number - 1}
        tokens = [r["length"] for r in written]
        assert np.average([r["kl"] for r in written], weights=tokens) == pytest.approx(kl, rel=1e-4)
    prompts = [r["prompt"] for number in range(1, 13) for r in rollouts(run, number)]
    assert prompts == sorted(set(prompts))


def test_interrupted_equals_uninterrupted_to_the_bit(on_policy_values, tmp_path, local_engines):
    on_policy_values["checkpoint"] |= {"save_every": 2, "keep": 5}
    whole = go(on_policy_values, output=str(tmp_path / "whole"))
    go(on_policy_values, output=str(tmp_path / "cut"))
    cut = tmp_path / "cut"
    first = [rollouts(cut, number) for number in range(1, 7)]
    shutil.rmtree(cut / "checkpoints" / "6")  # as if killed while step 6 was drawn: step 5's responses are there
    shutil.rmtree(cut / "export")
    (cut / "rollouts" / "step_000006.jsonl").unlink()
    local_engines.clear()
    resumed = go(on_policy_values, output=str(cut))
    assert metrics(tmp_path / "whole") == metrics(cut)
    assert [rollouts(cut, number) for number in range(1, 7)] == first
    assert local_engines[1].calls.count("generate") == 1
    for x, y in zip(*(jax.tree.leaves(load_model(r.export)) for r in (whole, resumed)), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))


def test_an_engine_that_keeps_old_weights_stops_the_run(on_policy_values, monkeypatch):
    send = StudentEngines._send
    sent = []

    def once(self, engine):
        sent.append(engine)
        return send(self, engine) if len(sent) == 1 else self._step.number

    monkeypatch.setattr(StudentEngines, "_send", once)
    on_policy_values["train"] |= {"learning_rate": 3e-2, "steps": 12}
    on_policy_values["checkpoint"] |= {"save_every": 1}
    with pytest.raises(UserError, match=r"step \d+: trainer and rollout engine disagree .* not the student's") as told:
        go(on_policy_values)
    step = int(re.search(r"step (\d+)", str(told.value))[1])
    folder = Path(on_policy_values["output"]) / "rollouts"
    assert sorted(path.name for path in folder.iterdir())[0] == f"refused_step_{step:06d}.jsonl"
    assert f"step {step - 1}" in str(told.value) and not (folder / f"step_{step:06d}.jsonl").exists()
    monkeypatch.setattr(StudentEngines, "_send", send)
    assert go(on_policy_values).steps == 12


@pytest.mark.parametrize("call", ["generate", "weights_bucket"])
def test_an_engine_that_dies_changes_nothing(on_policy_values, tmp_path, local_engines, monkeypatch, call):
    go(on_policy_values, output=str(tmp_path / "whole"))
    local_engines.clear()
    shown = Lines()
    draw = StudentEngines.generate

    def sometimes(self, prompts, seeds):
        if self.version == 3:
            self.engines[0].deaths.append(call)
        return draw(self, prompts, seeds)

    monkeypatch.setattr(StudentEngines, "generate", sometimes)
    go(on_policy_values, shown)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert local_engines[1].starts == 2
    assert [line for line in shown.lines if f"during {call}; starting it again, 1 of 3" in line]


def test_a_sync_that_hangs_again_and_again_ends_the_run_with_the_tensor_and_it_goes_on(
    on_policy_values, tmp_path, monkeypatch
):
    """an engine that dies and hangs as often as it may is forgiven"""
    draw = StudentEngines.generate

    def strike(self, prompts, seeds):
        completions = draw(self, prompts, seeds)
        if self.version == 2:
            self.engines[0].deaths += ["weights_bucket"]
            self.engines[0].hangs += ["weights_bucket"]
        if self.version == 3:
            self.engines[0].hangs += 3 * ["weights_bucket"]
        return completions

    on_policy_values["rollout"] |= {"restarts": 2}
    with monkeypatch.context() as patched:
        patched.setattr(StudentEngines, "generate", strike)
        with pytest.raises(EngineError) as caught:
            go(on_policy_values)
    told = r"the student's weights of step 4 did not reach its engine: it broke off at \S+ to \S+: engine .*student "
    assert re.match(told + r"gave no answer to weights_bucket within 60 s and was stopped\n", str(caught.value))
    assert "(started again 2 times; rollout.restarts)\nsaved step 4; run the same" in str(caught.value)
    assert go(on_policy_values).steps == 6
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_two_engines_and_turns_give_the_same_run(on_policy_values, tmp_path, local_engines):
    go(on_policy_values, output=str(tmp_path / "one"))
    on_policy_values["rollout"]["engines"] = 2
    go(on_policy_values, output=str(tmp_path / "two"))
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    local_engines.clear()
    on_policy_values["rollout"]["engines"] = 1
    go(on_policy_values, output=str(tmp_path / "turns"), colocate=True)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "turns")
    calls = local_engines[1].calls
    second = calls.index("generate", calls.index("generate") + 1)
    turn = [name for name in calls[calls.index("generate") : second] if not name.startswith("weights_")]
    assert turn == ["generate", "sleep", "wake", "wake"]  # all sleeps; weights for the sync; the cache to write


def test_rows_of_the_data_are_mixed_in(on_policy_values, tmp_path):
    on_policy_values["distill"] |= {"on_policy_fraction": 0.5, "kd_ratio": 0.7}
    on_policy_values["data"]["max_len"] = 400
    on_policy_values["rollout"]["temperature"] = 0.7  # at which both sides say how likely a token was
    go(on_policy_values)
    assert max(metrics(tmp_path / "run", "ce")) > 1
    assert max(metrics(tmp_path / "run", "rollout/k3")) < 1e-6


def test_what_a_step_has_no_rows_of_is_not_told_as_nothing(on_policy_values, tmp_path):
    """with prompts that come by one, a step has a row of the data or a response, never both"""
    on_policy_values["distill"] |= {"on_policy_fraction": 0.5, "kd_ratio": 0.7}
    on_policy_values["data"]["max_len"] = 400
    on_policy_values["rollout"]["prompts"] = 1
    go(on_policy_values)
    steps = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    kinds = [("ce" in r, "rollout/k3" in r, "rollout/entropy" in r) for r in steps]
    assert set(kinds) == {(True, False, False), (False, True, True)}


def test_nothing_is_written_that_no_step_learns_from(on_policy_values, tmp_path):
    on_policy_values["rollout"] |= {"max_staleness": 2, "max_k3": 1.0}
    on_policy_values["distill"].pop("kd_ratio")
    assert from_dict(on_policy_values).distill.kd_ratio == 1.0  # there is no row for cross-entropy
    go(on_policy_values)
    assert len(list((tmp_path / "run" / "rollouts").iterdir())) == 6
    assert not metrics(tmp_path / "run", "ce")


@pytest.mark.parametrize(("staleness", "every"), [(1, 1), (2, 2)])
def test_stale_responses_overlap_with_training_and_are_weighed(on_policy_values, tmp_path, staleness, every):
    rollout = {"max_staleness": staleness, "sync_every": every, "importance_clip": 2.0, "max_k3": 1.0}
    on_policy_values["rollout"] |= rollout
    go(on_policy_values)
    ages = metrics(tmp_path / "run", "rollout/staleness")
    assert 0.0 <= min(ages) and max(ages) <= staleness and sum(ages) >= 3
    written = [(number, r["version"]) for number in range(1, 7) for r in rollouts(tmp_path / "run", number)]
    assert max(number - 1 - version for number, version in written) == staleness
    versions = {version for _, version in written}
    assert len(versions) > 1 and all(version % every == 0 for version in versions)
    assert max(metrics(tmp_path / "run", "rollout/hidden")) > 0.05
    weights = metrics(tmp_path / "run", "rollout/weight")
    assert all(0.3 < w <= 2.0 for w in weights) and weights[-1] != 1.0


@pytest.mark.parametrize("engines", [1, 2])
def test_an_engine_that_dies_behind_training_loses_and_doubles_no_prompt(
    on_policy_values, tmp_path, local_engines, monkeypatch, engines
):
    """it dies while it writes for a later step, and again with new weights in its hands; one of two alone"""
    on_policy_values["rollout"] |= {"max_staleness": 2, "engines": engines, "importance_clip": 2.0, "max_k3": 1.0}
    on_policy_values["log"]["every"] = 4
    draw, dies = StudentEngines.generate, ["weights_bucket", "generate"]

    def sometimes(self, prompts, seeds):
        if dies and self.version >= 2:
            self.engines[-1].deaths.append(dies.pop())
        return draw(self, prompts, seeds)

    monkeypatch.setattr(StudentEngines, "generate", sometimes)
    assert go(on_policy_values).steps == 6
    run = tmp_path / "run"
    assert local_engines[-1].starts == 3 and not dies
    written = [(number, r) for number in range(1, 7) for r in rollouts(run, number)]
    prompts = [r["prompt"] for _, r in written]
    assert prompts == sorted(set(prompts)) and len({number for number, _ in written}) == 6
    assert all(0 <= number - 1 - r["version"] <= 2 for number, r in written)
    assert len(metrics(run, "rollout/k3")) == 6 and len(metrics(run)) == 2  # of every step, whatever log.every


def test_policy_gradient_with_a_reward(on_policy_values, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def digits(prompt, response, row):\n    return sum(c.isdigit() for c in response) / 8\n")
    on_policy_values["distill"] |= {"algorithm": "policy_gradient"}
    on_policy_values["rollout"] |= {"reward": f"{reward}:digits", "n_samples": 2}
    go(on_policy_values)
    run = tmp_path / "run"
    found = [r["reward"] for number in range(1, 7) for r in rollouts(run, number)]
    assert all(r is not None for r in found) and metrics(run, "rollout/reward")[0] >= 0
    assert np.isfinite(metrics(run)).all() and max(metrics(run, "rollout/k3")) < 1e-6


def test_an_algorithm_that_hides_other_weights_takes_no_step(on_policy_values, root, tmp_path, monkeypatch):
    monkeypatch.setattr(Step, "__call__", lambda *_: pytest.fail("a step was taken"))
    on_policy_values["distill"] |= {"algorithm": f"{root}/examples/own_algorithm.py:WithFeatures"}
    with pytest.raises(UserError, match="does not report rollout/k3"):
        go(on_policy_values)
    assert not (tmp_path / "run").exists()


def test_an_algorithm_that_is_not_for_rollouts_starts_no_engine(on_policy_values, local_engines):
    on_policy_values["distill"] |= {"algorithm": "feature"}
    with pytest.raises(UserError, match="feature does not learn from rollouts"):
        go(on_policy_values)
    assert not local_engines


@pytest.mark.parametrize(
    ("distill", "rollout", "message"),
    [
        ({"algorithm_args": {"signal": "k1"}}, {}, "expected gradient of zero"),
        ({"algorithm_args": {"signal": "k9"}}, {}, "knows advantage, k2, k3"),
        ({}, {"top_p": 0.9}, "cut-off distribution"),
        ({}, {"top_k": 5}, "cut-off distribution"),
        ({"temperature": 2.0}, {}, "compares at the sampling temperature"),
        ({"on_policy_fraction": 0.0}, {}, "needs rollouts"),
        ({"on_policy_fraction": 0.5}, {}, "would learn nothing from the rows of the data"),
    ],
)
def test_policy_gradient_refuses_what_would_be_wrong(on_policy_values, distill, rollout, message):
    on_policy_values["distill"] |= {"algorithm": "policy_gradient"} | distill
    on_policy_values["rollout"] |= rollout
    with pytest.raises(UserError, match=message):
        go(on_policy_values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"sync_every": 3}}, "rollout.sync_every=3 makes weights up to 2 steps old"),
        ({"distill": {"on_policy_fraction": 1.0, "kd_ratio": 0.0}}, "cross-entropy on what the student itself wrote"),
        ({"rollout": {"max_new_tokens": 300}}, "leaves no room for a prompt"),
        ({"teacher": {}}, "judged by a teacher"),
        ({"rollout": {"reward": "gsm8k"}}, "compares responses to one prompt"),
        ({"teacher": {"path": "t", "update_every": 1, "dp": 2}}, "where there are several copies; set teacher.dp=1"),
        ({"teacher": {"path": "t", "update_every": 1, "quantization": "fp8"}}, "teacher.quantization=fp8: a quantized"),
        ({"rollout": {"max_new_tokens": 8, "args": {"quantization": "fp8"}}}, "rollout.args.quantization=fp8: a quant"),
        (
            {"distill": {"on_policy_fraction": 1.0, "algorithm": "policy_gradient", "loss": "jsd"}},
            "policy_gradient learns from its signal alone",
        ),
        ({"colocate": True, "rollout": {"max_staleness": 2, "max_new_tokens": 8}}, "colocate takes turns"),
    ],
)
def test_configurations_that_make_no_sense(on_policy_values, changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(on_policy_values | changes)
