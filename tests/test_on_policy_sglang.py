"""The student in a real SGLang engine: its weights arrive, its words are the student's, and it may be killed."""

import json
import os
import signal

import numpy as np
import pytest
from engine_models import Reference

from bridge.engine import Sampling
from kdjax.algorithms import make_algorithm
from kdjax.config import from_dict
from kdjax.training.optimizer import make_optimizer
from kdjax.training.preflight import check_student
from kdjax.training.sources import Stream
from kdjax.training.step import make_step
from kdjax.training.student import export_student, make_student

pytestmark = pytest.mark.usefixtures("devices_as_asked")


def test_weights_arrive_and_a_killed_engine_comes_back_with_them(
    on_policy_values, sharded_values, tmp_path, monkeypatch
):
    from local_engine import LocalEngine

    # the teacher alone; the student's is the real one
    monkeypatch.setattr("kdjax.training.teacher.started", lambda model, key, **how: LocalEngine(model, **how))
    on_policy_values["rollout"] |= {"engine": "sglang", "threads": 1, "args": {"max_total_tokens": 4096}}
    on_policy_values["train"] |= {"steps": 4, "learning_rate": 1e-2}
    on_policy_values["mesh"] = {"data": 1, "fsdp": 2}  # so weights are gathered on their way
    config = from_dict(on_policy_values)
    told: list[str] = []
    with Stream(config, log=tmp_path / "engine.log", tell=told.append) as stream:
        model = make_student(config, stream.mesh)
        algorithm = make_algorithm(config, model, stream.teachers)
        step = make_step(model, algorithm, make_optimizer(config.train, 4), stream.mesh)
        stream.attach(step)
        assert check_student(stream, step) == []
        engine = stream.students.engines[0]
        mismatch = []
        for number in range(1, 5):
            if number == 3:
                os.kill(engine.pid, signal.SIGKILL)
            batch = next(stream)
            mismatch.append(float(step(batch)["rollout/k3"]))
            assert len([line for line in told if "starting it again" in line]) == (number >= 3)
        assert max(mismatch) < 1e-6
        stream.students.sync()
        exported = export_student(step.model, config, tmp_path / "exported")
        prompts = [document.ids for document in stream.documents(3)]
        greedy = engine.generate(prompts, Sampling(max_new_tokens=10, temperature=0.0))
        reference = Reference(exported)
        assert [c.ids.tolist() for c in greedy] == [reference.greedy(ids, 10, {2}) for ids in prompts]
        assert {c.version for c in greedy} == {4}
    lines = (tmp_path / "run" / "rollouts" / "step_000004.jsonl").read_text().splitlines()[1:]
    for line in map(json.loads, lines):
        assert line["version"] == 3 and np.isfinite(line["kl"])
