"""A teacher that is the student's own past: weights in closed form, in its engine, in the step, after a resume."""

import json
import shutil

import jax
import numpy as np
import pytest
from run_tools import Watcher

from bridge import client
from bridge.weight_sync import WeightBucket
from kdjax.algorithms import make_algorithm
from kdjax.config import from_dict
from kdjax.errors import UserError
from kdjax.models import load_model
from kdjax.progress import Display
from kdjax.training.loop import train
from kdjax.training.optimizer import make_optimizer
from kdjax.training.preflight import check_teacher
from kdjax.training.sources import Stream
from kdjax.training.step import make_step
from kdjax.training.student import make_student

pytestmark = pytest.mark.usefixtures("devices_as_asked", "local_engines")
EVERY, DECAY = 2, 0.75


@pytest.fixture
def values(run_values):
    run_values["student"] = {"path": run_values["teacher"]["path"]}
    run_values["teacher"] |= {"update_every": EVERY, "ema_decay": DECAY}
    source = run_values["data"]["train"][0]
    source["teacher_prompt"] = "{question}\n{answer}"
    source["max_samples"] = 60
    run_values["data"] |= {"max_len": 512}
    run_values["data"].pop("eval")
    run_values["distill"] = {"kd_ratio": 1.0}
    run_values["train"] |= {"eval_every": None, "eval_rows": None, "batch_size": 2}
    return run_values


def flat(params):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]


def test_the_average_is_what_it_should_be_in_the_engine_and_in_the_step(values, sharded_values, tmp_path):
    config = from_dict(values | {"mesh": {"data": 1, "fsdp": 2}})
    with Stream(config, log=tmp_path / "engine.log") as stream:
        model = make_student(config, stream.mesh)
        algorithm = make_algorithm(config, model, stream.teachers)
        step = make_step(model, algorithm, make_optimizer(config.train, 6), stream.mesh)
        stream.attach(step)
        expected, history = flat(step.state["params"]["student"]), []
        for number in range(1, 7):
            batch = next(stream)
            step(batch)
            history.append(flat(step.state["params"]["student"]))
            if number % EVERY == 0 and number < 6:
                expected = [DECAY * e + (1 - DECAY) * s for e, s in zip(expected, history[-1], strict=True)]
        teacher = stream.self_teacher
        assert teacher.version == 4
        layouts = [jax.tree.map(lambda x: x.sharding, t) for t in (teacher.params, step.state["params"]["student"])]
        assert layouts[0] == layouts[1] and not jax.tree.leaves(layouts[0])[0].is_fully_replicated
        for mine, wanted in zip(flat(teacher.params), expected, strict=True):
            np.testing.assert_allclose(mine, wanted, atol=1e-6)
        assert max(np.abs(a - b).max() for a, b in zip(flat(teacher.params), history[-1], strict=True)) > 1e-4
        # The engine's own log-probabilities are those of its hidden rows under the head that the step has now.
        is_variable = lambda x: hasattr(x, "get_value")  # noqa: E731
        (head,) = [v.get_value() for v in jax.tree.leaves(step._frozen["extra"], is_leaf=is_variable)]
        stream.teachers = (stream.teachers[0]._replace(head=head),)
        assert check_teacher(stream) < 1e-4
        assert step._update._cache_size() <= len({b.shape for b in [batch.arrays.rows]}) + 3


def go(values, **changes):
    return train(from_dict({**values, **changes}), Display(quiet=True))


def losses(folder):
    return [record["loss"] for record in records(folder) if "loss" in record]


def test_interrupted_equals_uninterrupted_to_the_bit_and_both_are_exported(values, tmp_path, local_engines):
    values["checkpoint"] |= {"save_every": 1, "keep": 9, "export_teacher": True}
    whole = go(values, output=str(tmp_path / "whole"))
    cut = tmp_path / "cut"
    dies = Watcher({3: lambda: local_engines[-1].deaths.append("weights_bucket")})  # with new weights in its hands
    train(from_dict(values | {"output": str(cut)}), dies)
    assert local_engines[-1].starts == 2 and losses(tmp_path / "whole") == losses(cut)
    for last in (4, 3):  # at step 4 the teacher is about to learn, at step 3 it is neither student of then nor of now
        for step in range(last + 1, 7):
            shutil.rmtree(cut / "checkpoints" / str(step))
        shutil.rmtree(cut / "export")
        go(values, output=str(cut))
        assert losses(tmp_path / "whole") == losses(cut)
        teachers = [flat(load_model(folder / "export_teacher")) for folder in (tmp_path / "whole", cut)]
        assert all(np.array_equal(a, b) for a, b in zip(*teachers, strict=True))
    students = flat(load_model(whole.export))
    assert max(np.abs(a - b).max() for a, b in zip(teachers[0], students, strict=True)) > 1e-4


@pytest.mark.parametrize(("every", "decay", "syncs"), [(2, 0.75, 12), (1, 0.0, 6)])
def test_one_engine_writes_and_judges_in_turn(values, tmp_path, local_engines, monkeypatch, every, decay, syncs):
    """The same run with two engines, with one, and with one that sleeps; where both have the same weights, one sync."""
    buckets = []
    monkeypatch.setattr(client, "WeightBucket", lambda size: buckets.append(WeightBucket(size)) or buckets[-1])
    values["teacher"] |= {"update_every": every, "ema_decay": decay}
    values["distill"] |= {"on_policy_fraction": 1.0, "loss": "rkl"}
    # As small as buckets get: the largest tensor's size.
    values["rollout"] = {"engine": "transformers", "max_new_tokens": 8, "bucket_bytes": 1}
    go(values, output=str(tmp_path / "two"))
    local_engines.clear(), buckets.clear()
    values["rollout"]["engines"] = 0
    go(values, output=str(tmp_path / "one"))
    assert len(local_engines) == 1 and local_engines[0].calls.count("weights_end") == syncs
    assert len(buckets) == 1 and local_engines[0].calls.count("weights_bucket") > syncs  # teacher's and student's
    go(values, output=str(tmp_path / "turns"), colocate=True)
    two, one, turns = (records(tmp_path / name) for name in ("two", "one", "turns"))
    assert max(r["rollout/k3"] for r in two) < 1e-6
    for name in ("loss", "rollout/kl"):
        assert [r[name] for r in two] == [r[name] for r in one] == [r[name] for r in turns]


def records(folder):
    """what the training steps reported; evaluations have records of their own"""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


BFLOAT16 = {"path": "t", "init": "pretrained", "param_dtype": "bfloat16"}
AVERAGE = {"update_every": 1, "ema_decay": 0.9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"path": "other"}}, "makes the teacher an earlier self"),
        ({"teacher": {"path": "t", "ema_decay": 0.9}}, "set teacher.update_every"),
        ({"student": BFLOAT16, "teacher": {"path": "t", **AVERAGE}}, "set student.param_dtype=float32"),
    ],
)
def test_what_is_no_earlier_self_is_refused(values, changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(values | changes)
