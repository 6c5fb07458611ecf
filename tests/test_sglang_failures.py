"""What SGLang says as a value where it fails is raised, by the name of the call and in SGLang's own words."""

from types import SimpleNamespace

import numpy as np
import pytest
from hosted import hosted

import bridge.sglang_engine
from bridge.engine import Prefill, Sampling
from bridge.errors import EngineError
from bridge.weight_sync import BucketSpec, Entry

PROMPTS = [np.array([5, 6, 7], np.int32)] * 2
MESSAGE = "the input is longer than the model's context"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("prefill", ([Prefill(ids, ((0, 1),), 0) for ids in PROMPTS],)),
        ("score", (PROMPTS,)),
        ("generate", (PROMPTS, Sampling(max_new_tokens=4), 0)),
    ],
)
@pytest.mark.parametrize(
    ("reason", "said"),
    [({"type": "abort", "message": MESSAGE, "status_code": 400}, MESSAGE), ({"type": "abort"}, "{'type': 'abort'}")],
)
def test_an_aborted_request(method, arguments, reason, said):
    def generate(input_ids, **_):
        assert input_ids == [[5, 6, 7], [5, 6, 7]]
        return [{"meta_info": {"finish_reason": each}} for each in ({"type": "length"}, reason)]

    with pytest.raises(EngineError) as caught:
        getattr(hosted(SimpleNamespace(generate=generate)), method)(*arguments)
    assert str(caught.value) == f"SGLang gave up prompt 1: {said}"


@pytest.mark.parametrize("more", [(), (["layers.0"],)])  # later versions say more than two things
def test_weights_that_are_refused(more):
    said = dict.fromkeys(("begin", "update", "end"), (True, "Success", *more))
    fake = SimpleNamespace(
        begin_weight_update=lambda: said["begin"],
        update_weights_from_tensor=lambda tensors, **_: said["update"],
        end_weight_update=lambda: said["end"],
        flush_cache=lambda: SimpleNamespace(success=True),
    )
    bucket = BucketSpec(64), [Entry(f"layers.{i}.weight", "float32", (1,), 4 * i) for i in range(5)]
    engine = hosted(fake)
    engine.begin_weights(), engine.load_weights(*bucket), engine.end_weights()

    refused = (False, "shape mismatch", *more)
    said["update"] = refused
    first = "layers.0.weight, layers.1.weight, layers.2.weight, … 5 tensors"
    with pytest.raises(EngineError) as caught:
        engine.load_weights(*bucket)
    assert str(caught.value) == f"SGLang's update_weights_from_tensor ({first}) failed: shape mismatch"
    said["begin"] = refused
    with pytest.raises(EngineError, match="^SGLang's begin_weight_update failed: shape mismatch$"):
        engine.begin_weights()
    said["end"] = refused
    with pytest.raises(EngineError, match="^SGLang's end_weight_update failed: shape mismatch$"):
        engine.end_weights()


def test_a_scheduler_that_does_not_become_idle(monkeypatch):
    answers = [False, False, True]
    engine = hosted(SimpleNamespace(flush_cache=lambda: SimpleNamespace(success=answers.pop(0))))
    engine.end_weights()
    assert not answers
    monkeypatch.setattr(bridge.sglang_engine, "IDLE_SECONDS", 0.05)
    engine = hosted(SimpleNamespace(flush_cache=lambda: SimpleNamespace(success=False)))
    with pytest.raises(EngineError, match=r"SGLang's scheduler did not become idle within 0\.05 s"):
        engine.sleep(None)
