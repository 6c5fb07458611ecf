"""What is SGLang's engine asked for, and in which order? Its two generations of weight updates, and its samplings."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from hosted import hosted

import bridge.sglang_engine
from bridge.engine import EngineSpec, Prefill, Sampling
from bridge.errors import EngineError
from bridge.hidden_pool import Block, PoolSpec
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
    assert told(0.25, dp_size=2) == told(0.25, tp_size=2, dp_size=2, enable_dp_attention=True) == pytest.approx(20 / 30)
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
        return [{"output_ids": [last], "meta_info": meta} for last, _ in zip(said, input_ids, strict=False)]

    engine, said = hosted(SimpleNamespace(generate=generate)), [4, 2]
    prompt = np.array([5, 6], np.int32)
    sampling = Sampling(max_new_tokens=1, stop_ids=(2,), banned_ids=(7, 9), n=2, seeds=(11, 12))
    (one, ended) = engine.generate([prompt], sampling, version=3)
    assert ended.finish_reason == "stop"  # 0.5.17 says length where an end is the last token allowed
    assert (one.ids.tolist(), one.logprobs.tolist(), one.finish_reason, one.version) == ([4], [-0.5], "length", 3)
    assert asked["ids"] == [[5, 6], [5, 6]] and [p["sampling_seed"] for p in asked["params"]] == [11, 12]
    for params in asked["params"]:
        assert params["logit_bias"] == {"7": float("-inf"), "9": float("-inf")}
        assert (params["top_k"], params["stop_token_ids"]) == (-1, [2])
    engine.generate([prompt], Sampling(), version=3)
    assert asked["params"][0]["logit_bias"] is None


@pytest.mark.parametrize(
    ("homes", "options", "expected"),
    [
        ("cdab", {"dp_size": 2, "tp_size": 2}, (1, 1, 0, 0)),
        ("cdab", {"dp_size": 2, "base_gpu_id": 2}, (0, 1, 0, 1)),  # on c and d; the others' shards are shared out
        ("dcba", {"dp_size": 4}, (3, 2, 1, 0)),
        ("ccad", {"dp_size": 4}, ()),  # the copy on b would have nothing to read
        ("", {"dp_size": 2}, (0, 1, 0, 1)),
        ("cdab", {}, ()),
        ("cdab", {"dp_size": 2, "tp_size": 4, "enable_dp_attention": True}, ()),
    ],
)
def test_prompts_are_read_by_the_copy_of_the_teacher_on_the_gpu_that_trains_on_them(
    monkeypatch, homes, options, expected
):
    monkeypatch.setattr(bridge.sglang_engine, "gpus", lambda: list("abcd"))
    blocks = tuple(Block(part, gpu, "") for part, gpu in enumerate(homes))
    spec = EngineSpec("sglang", "m", "bfloat16", "cuda", PoolSpec("", 64, 8, "bfloat16", 4, blocks), options=options)
    asked = []

    async def async_generate(input_ids, sampling_params, rid, routed_dp_rank):
        asked.append((routed_dp_rank, [int(name.split(":")[3]) for name in rid], input_ids))
        await asyncio.sleep(0)
        aborted = {"type": "abort", "message": "too long"}
        return [{"meta_info": {"finish_reason": aborted if ids == [9] else {"type": "length"}}} for ids in input_ids]

    def generate(input_ids, sampling_params, rid):
        return asyncio.run(async_generate(input_ids, sampling_params, rid, None))

    loop = SimpleNamespace(run_until_complete=asyncio.run)
    engine = hosted(SimpleNamespace(loop=loop, async_generate=async_generate, generate=generate), spec)
    rows = [0, 16, 20, 32, 63]
    engine.prefill([Prefill(np.array([row], np.int32), ((0, 1),), row) for row in rows])
    parts = [row // 16 for row in rows]
    wanted = {expected[part] if expected else None for part in parts}
    assert {replica: given for replica, given, _ in asked} == {
        replica: [row for row, part in zip(rows, parts, strict=True) if not expected or expected[part] == replica]
        for replica in wanted
    }
    assert len(asked) == len(wanted) and all(ids == [[row] for row in given] for _, given, ids in asked)
    with pytest.raises(EngineError, match="SGLang gave up prompt 1: too long"):
        engine.prefill([Prefill(np.array([i], np.int32), ((0, 1),), row) for i, row in ((1, 0), (9, 63))])
