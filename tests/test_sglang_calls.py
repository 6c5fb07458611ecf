"""What is SGLang's engine asked for, and in which order? Its two generations of weight updates, and its samplings."""

from types import SimpleNamespace

import numpy as np
import pytest
from hosted import hosted

import bridge.sglang_engine
from bridge.engine import EngineSpec, Sampling
from bridge.errors import EngineError
from bridge.sglang_weights import LOADER
from bridge.weight_sync import BucketSpec, Entry

BUCKET = BucketSpec(64, path="/dev/shm/none")
ENTRIES = [Entry("a", "float32", (4,), 0)]


class Old:
    """SGLang 0.5.17: no sessions around weight updates. Idle at the second time of asking."""

    def __init__(self):
        self.calls, self.idle = [], False

    def update_weights_from_tensor(self, named, *, load_format, flush_cache):
        assert load_format == LOADER and not flush_cache and len(named) == 1
        return self.done("update")

    def flush_cache(self):
        self.calls.append("flush")
        self.idle, idle = True, self.idle
        return SimpleNamespace(success=idle)

    def done(self, call):
        self.calls.append(call)
        return (True, "")


class New(Old):
    """SGLang 0.5.23: refuses updates outside a session; answers have a third value."""

    def begin_weight_update(self):
        return (*self.done("begin"), {})

    def end_weight_update(self):
        return (*self.done("end"), {})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Old, ["update", "update", "flush", "flush"]), (New, ["begin", "update", "update", "end", "flush", "flush"])],
)
def test_weights_are_updated_in_a_session_where_there_is_one(kind, expected):
    engine = hosted(kind())
    engine.begin_weights()
    engine.load_weights(BUCKET, ENTRIES)
    engine.load_weights(BUCKET, ENTRIES)
    engine.end_weights()
    assert engine._engine.calls == expected


def test_an_update_after_one_that_broke_off_ends_its_session_first():
    engine = hosted(New())
    engine.begin_weights()
    engine.load_weights(BUCKET, ENTRIES)
    engine.begin_weights()
    assert engine._engine.calls == ["begin", "update", "end", "flush", "flush", "begin"]


def test_a_share_of_the_whole_memory_is_told_as_one_of_what_is_free(monkeypatch):
    free = [80, 30, 40]
    monkeypatch.setattr(bridge.sglang_engine, "gpus", lambda: ["a", "b", "c"])
    monkeypatch.setattr(bridge.sglang_engine, "memory", lambda ordinal: (free[ordinal] * 2**30, 80 * 2**30))

    def told(share, **options):
        spec = EngineSpec("sglang", "m", "bfloat16", "cuda", mem_fraction=share, options=options)
        return bridge.sglang_engine._memory(spec)["mem_fraction_static"]

    assert told(0.25) == 0.25
    assert told(0.25, tp_size=2) == pytest.approx(20 / 30)  # by the GPU that has least
    assert told(0.25, base_gpu_id=2, tp_size=2) == 0.5
    with_own = EngineSpec("sglang", "m", "bfloat16", "cuda", mem_fraction=0.9, options={"mem_fraction_static": 0.3})
    assert bridge.sglang_engine._memory(with_own) == {}
    with pytest.raises(EngineError, match="mem_fraction 0.4 is 32.0 GiB of GPU 1, which has 30.0 GiB free: lower it"):
        told(0.4, base_gpu_id=1)
    with pytest.raises(EngineError, match="GPU 3 is to run the engine, and this process sees 3"):
        told(0.1, base_gpu_id=3)


def test_a_sampling_in_sglangs_words():
    asked = {}

    def generate(input_ids, sampling_params, return_logprob):
        asked.update(ids=input_ids, params=sampling_params)
        meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [(-0.5, 4, None)]}
        return [{"output_ids": [4], "meta_info": meta} for _ in input_ids]

    engine = hosted(SimpleNamespace(generate=generate))
    prompt = np.array([5, 6], np.int32)
    sampling = Sampling(max_new_tokens=1, stop_ids=(2,), banned_ids=(7, 9), n=2, seeds=(11, 12))
    (one, _) = engine.generate([prompt], sampling, version=3)
    assert (one.ids.tolist(), one.logprobs.tolist(), one.finish_reason, one.version) == ([4], [-0.5], "length", 3)
    assert asked["ids"] == [[5, 6], [5, 6]] and [p["sampling_seed"] for p in asked["params"]] == [11, 12]
    for params in asked["params"]:
        assert params["logit_bias"] == {"7": float("-inf"), "9": float("-inf")}
        assert (params["top_k"], params["stop_token_ids"]) == (-1, [2])
    engine.generate([prompt], Sampling(), version=3)
    assert asked["params"][0]["logit_bias"] is None
