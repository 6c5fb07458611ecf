"""Does every engine keep the protocol? One suite, run against SGLang and transformers, each in a server process."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import engine_models
import jax
import numpy as np
import pytest
import torch
from engine_models import Reference, random_prompts, random_spans
from processes import family, gone, schedulers
from run_tools import ENVIRONMENT, wait_until

from bridge.client import RemoteEngine, start_engine
from bridge.engine import Prefill, Sampling
from bridge.errors import EngineError
from bridge.hidden_pool import HiddenPool

POOL_ROWS = 512
BANNED = (7, 200, 383)
OPTIONS = {"sglang": {"chunked_prefill_size": 32, "max_total_tokens": 4096}, "transformers": {}}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("models")
    return engine_models.save_model(base / "first", 0), engine_models.save_model(base / "second", 1)


@pytest.fixture(scope="session")
def first(folders) -> Reference:
    return Reference(folders[0])


@pytest.fixture(scope="session")
def second(folders) -> Reference:
    return Reference(folders[1])


def begin(kind, folder, logs) -> RemoteEngine:
    pool = HiddenPool.create(rows=POOL_ROWS, width=engine_models.WIDTH, dtype="float32")
    log, options = logs / f"{kind}.log", OPTIONS[kind]
    return start_engine(folder, kind=kind, log=log, pool=pool, threads=1, options=options, wait=False)


@pytest.fixture(scope="module")
def started(folders, tmp_path_factory):
    """both engines, starting side by side"""
    engines = {kind: begin(kind, folders[0], tmp_path_factory.mktemp("logs")) for kind in OPTIONS}
    yield engines
    for engine in engines.values():
        engine.close()
        engine.pool.close()


@pytest.fixture(params=OPTIONS)
def engine(request, started) -> RemoteEngine:
    engine = started[request.param]
    if engine.pid is None:  # a test before this one killed it
        engine.restart()
    return engine


def prefill_rows(engine: RemoteEngine, prompts, spans) -> list[np.ndarray]:
    """lease, prefill, view, copy, release: the rows of each prompt"""
    counts = [sum(stop - start for start, stop in one) for one in spans]
    with engine.pool.lease([sum(counts)], timeout=10) as lease:
        at = lease.starts[0] + np.cumsum([0, *counts])
        engine.prefill([Prefill(i, s, int(r)) for i, s, r in zip(prompts, spans, at[:-1], strict=True)], timeout=60)
        view = np.array(jax.dlpack.from_dlpack(lease.view(0), copy=False))
    return np.split(view, np.cumsum(counts)[:-1])


def assert_rows(rows, reference: Reference, prompts, spans) -> None:
    for got, ids, ranges in zip(rows, prompts, spans, strict=True):
        hidden = reference.hidden(ids)
        np.testing.assert_allclose(got, np.concatenate([hidden[a:b] for a, b in ranges]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "spans"),
    [
        ([5, 23, 9], [((1, 5),), ((20, 23),), ((0, 9),)]),
        ([1, 1, 12], [((0, 1),), ((0, 1),), ((11, 12),)]),
        ([30, 17], [((0, 2), (5, 6), (28, 30)), ((3, 9), (10, 17))]),
        ([100, 3, 75], [((0, 100),), ((1, 2),), ((30, 34), (60, 75))]),  # SGLang takes these in chunks of 32
    ],
    ids=["ragged", "one_token", "several_spans", "chunked"],
)
def test_hidden_rows_are_transformers_final_norm_states(engine, first, lengths, spans):
    prompts = random_prompts(np.random.default_rng(0), lengths)
    assert_rows(prefill_rows(engine, prompts, spans), first, prompts, spans)


def test_more_prompts_than_fit_one_pool(engine, first):
    rng = np.random.default_rng(1)
    prompts = random_prompts(rng, rng.integers(1, 90, 60).tolist())
    spans = [random_spans(rng, len(ids)) for ids in prompts]
    assert sum(b - a for ranges in spans for a, b in ranges) > POOL_ROWS
    for start in range(0, len(prompts), 6):
        turn = slice(start, start + 6)
        assert_rows(prefill_rows(engine, prompts[turn], spans[turn]), first, prompts[turn], spans[turn])
    assert engine.pool.usage().used == 0


def test_prefill_writes_only_the_leased_rows(engine):
    prompts = random_prompts(np.random.default_rng(2), [40, 11])
    with engine.pool.lease([POOL_ROWS], timeout=10) as lease:
        everything = torch.from_dlpack(lease.view(0))
        everything.fill_(-7.0)
        engine.prefill([Prefill(prompts[0], ((2, 5), (30, 40)), 16), Prefill(prompts[1], ((0, 11),), 100)], timeout=60)
        written = (everything != -7.0).any(axis=1).nonzero()[:, 0]
    assert written.tolist() == [*range(16, 29), *range(100, 111)]


def test_prefill_refuses_rows_that_are_not_leased(engine):
    ids = np.arange(2, 12, dtype=np.int32)
    with engine.pool.lease([8], timeout=10) as lease:
        with pytest.raises(ValueError, match="not leased"):
            engine.prefill([Prefill(ids, ((0, 9),), lease.starts[0])])
        with pytest.raises(ValueError, match="two prompts would write row"):
            engine.prefill([Prefill(ids, ((0, 4),), lease.starts[0]), Prefill(ids, ((0, 4),), lease.starts[0] + 3)])


def test_score_is_the_log_softmax(engine, first):
    prompts = random_prompts(np.random.default_rng(3), [2, 31, 64, 7])
    for ids, scores in zip(prompts, engine.score(prompts, timeout=60), strict=True):
        expected = np.take_along_axis(first.logprobs(ids)[:-1], ids[1:, None].astype(np.int64), 1)[:, 0]
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


def test_greedy_equals_transformers(engine, first):
    prompts = random_prompts(np.random.default_rng(4), [1, 9, 40, 5])
    sampling = Sampling(max_new_tokens=12, temperature=0.0, banned_ids=BANNED)
    completions = engine.generate(prompts, sampling, timeout=60)
    for ids, completion in zip(prompts, completions, strict=True):
        assert completion.ids.tolist() == first.greedy(ids, 12, {1}, BANNED)
        np.testing.assert_allclose(completion.logprobs, sampled(first, ids, completion), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.7, "top_k": 9}], ids=["all", "cut"])
@pytest.mark.parametrize("temperature", [0.6, 2.5])
def test_logprobs_are_those_at_the_sampling_temperature_before_any_cut(engine, first, temperature, cut):
    prompts = random_prompts(np.random.default_rng(12), [3, 18])
    sampling = Sampling(max_new_tokens=10, temperature=temperature, n=2, banned_ids=BANNED, **cut)
    completions = engine.generate(prompts, sampling, timeout=60)
    for ids, completion in zip([prompts[0], prompts[0], prompts[1], prompts[1]], completions, strict=True):
        expected = sampled(first, ids, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4, rtol=0)


def sampled(reference: Reference, ids, completion, temperature: float = 1.0) -> np.ndarray:
    """the reference's log-probability of each sampled id, in float64"""
    whole = reference.logprobs(np.concatenate([ids, completion.ids]))[len(ids) - 1 : -1] / temperature
    whole[:, list(BANNED)] = -np.inf
    whole -= np.logaddexp.reduce(whole, axis=1, keepdims=True)
    return np.take_along_axis(whole, completion.ids[:, None].astype(np.int64), 1)[:, 0]


def test_a_stop_id_ends_a_completion_and_belongs_to_it(engine, first):
    (ids,) = random_prompts(np.random.default_rng(5), [6])
    free = first.greedy(ids, 8, set())
    stop = free[3]
    (completion,) = engine.generate([ids], Sampling(max_new_tokens=8, temperature=0.0, stop_ids=(stop,)), timeout=60)
    assert completion.ids.tolist() == free[: free.index(stop) + 1]
    assert completion.finish_reason == "stop"
    (cut,) = engine.generate([ids], Sampling(max_new_tokens=2, temperature=0.0), timeout=60)
    assert (cut.ids.tolist(), cut.finish_reason) == (free[:2], "length")


def test_samples_differ_and_banned_ids_never_come(engine):
    prompts = random_prompts(np.random.default_rng(6), [4, 4])
    banned = tuple(range(2, engine_models.VOCAB, 2))  # every other id, so that none of them comes by chance
    sampling = Sampling(max_new_tokens=20, temperature=3.0, n=6, banned_ids=banned)
    completions = engine.generate(prompts, sampling, timeout=60)
    assert len(completions) == 12
    assert len({tuple(completion.ids) for completion in completions}) == 12
    assert not set(banned) & {int(i) for completion in completions for i in completion.ids}
    with pytest.raises(ValueError, match="the model knows 0 to 383"):
        engine.generate(prompts, Sampling(banned_ids=(engine_models.VOCAB,)), timeout=60)


def test_top_k_one_is_greedy(engine, first):
    (ids,) = random_prompts(np.random.default_rng(7), [10])
    for sampling in (Sampling(max_new_tokens=5, top_k=1), Sampling(max_new_tokens=5, top_p=1e-6)):
        (completion,) = engine.generate([ids], sampling, timeout=60)
        assert completion.ids.tolist() == first.greedy(ids, 5, {1})


def test_bad_prompts_are_refused_and_the_engine_lives_on(engine):
    for ids, message in [
        (np.array([], np.int32), "T >= 1"),
        (np.array([1, 2], np.int64), "int32"),
        (np.array([1, engine_models.VOCAB], np.int32), "the model knows 0 to 383"),
        (np.ones(600, np.int32), "exceeds the engine's limit"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.score([ids])
    assert engine.health().kind == engine.spec.kind


def test_new_weights_change_the_outputs_to_theirs(engine, first, second):
    prompts = random_prompts(np.random.default_rng(8), [12, 33])
    spans = [((0, 12),), ((5, 33),)]
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    engine.update_weights(second.weights().items(), version=3, bucket_bytes=200_000, timeout=60)
    completions = engine.generate(prompts, sampling, timeout=60)
    assert [c.ids.tolist() for c in completions] == [second.greedy(ids, 8, {1}) for ids in prompts]
    assert {c.version for c in completions} == {3} and engine.health().version == 3
    assert_rows(prefill_rows(engine, prompts, spans), second, prompts, spans)
    engine.update_weights(first.weights().items(), version=4, timeout=60)
    assert_rows(prefill_rows(engine, prompts, spans), first, prompts, spans)


def test_a_broken_weight_update_names_the_tensor_and_is_not_used(engine, first):
    (ids,) = random_prompts(np.random.default_rng(9), [5])
    good = first.weights()
    norm = "model.norm.weight"
    for bad, message in [
        ({**good, "model.layers.9.mlp.up_proj.weight": good[norm]}, "model.layers.9.mlp.up_proj.weight: no tensor"),
        ({**good, norm: good[norm][:-1]}, r"model.norm.weight: shape \(63,\), the model's is \(64,\)"),
        ({name: value for name, value in good.items() if name != norm}, "did not arrive: model.norm.weight"),
    ]:
        with pytest.raises(EngineError, match=message):
            engine.update_weights(bad.items(), version=9, timeout=60)
        with pytest.raises(EngineError, match="broke off"):
            engine.score([ids])
    engine.update_weights(good.items(), version=10, timeout=60)
    assert len(engine.score([ids])[0]) == 4


def test_sleep_and_wake_keep_the_answers(engine):
    prompts = random_prompts(np.random.default_rng(10), [15])
    before = engine.score(prompts)
    engine.sleep(["kv_cache", "weights"], timeout=60)
    engine.wake(["weights", "kv_cache"], timeout=60)
    np.testing.assert_allclose(engine.score(prompts)[0], before[0], atol=1e-5, rtol=0)


def test_health_answers_while_the_engine_is_busy(engine):
    prompts = random_prompts(np.random.default_rng(11), [400] * 8)
    worker = threading.Thread(target=engine.generate, args=(prompts, Sampling(max_new_tokens=60, temperature=1.0)))
    worker.start()
    seen = set()
    while worker.is_alive():
        busy = engine.health(timeout=30).busy
        seen.add(busy and busy[0])
    worker.join()
    assert "generate" in seen
    assert engine.health().counts["generated_tokens"] > 0


def test_the_engine_holds_to_its_threads(engine):
    """OMP's pool is as wide as asked, in the process that runs the model"""
    for pid in family(engine.pid):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"OMP_NUM_THREADS=1" in environment


def test_an_idle_engine_leaves_the_cores_alone(engine):
    def seconds() -> float:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in family(engine.pid)]
        return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")

    engine.health()
    before = seconds()
    time.sleep(1.0)
    assert seconds() - before < 0.2


# From here on tests kill engines; they come last so that none has to start again.


def test_a_missed_deadline_is_named_and_stops_the_engine(started):
    engine = started["transformers"]
    engine.wait_ready()
    pid, folder = engine.pid, engine._server.folder
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(EngineError, match="no answer to score within 1 s"):
        engine.score([np.ones(200_000, np.int32)] * 4, timeout=1.0)  # more than the socket takes: even sending waits
    assert time.monotonic() - began < 5
    assert gone(pid) and not Path(folder).exists()
    with pytest.raises(EngineError, match="is stopped, so it cannot answer score: restart it"):
        engine.score([np.ones(4, np.int32)])
    engine.restart()
    assert len(engine.score([np.ones(4, np.int32)])[0]) == 3


SERVER_TOO = pytest.param("sglang", "server", marks=pytest.mark.full)


@pytest.mark.parametrize(("kind", "victim"), [("transformers", "server"), ("sglang", "scheduler"), SERVER_TOO])
def test_a_killed_engine_raises_within_seconds_and_leaves_nothing(started, folders, tmp_path, kind, victim):
    if started[kind].pid is None:  # the case before this one closed it
        started[kind] = begin(kind, folders[0], tmp_path)
    engine = started[kind]
    engine.wait_ready()
    pids, folder = family(engine.pid), engine._server.folder
    files = list(engine._server.leftovers)
    os.kill(engine.pid if victim == "server" else schedulers(engine.pid)[0], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match="died|is stopped"):
        engine.generate([np.ones(4, np.int32)], Sampling(max_new_tokens=200, temperature=0.0))
    assert time.monotonic() - began < 5
    wait_until(lambda: all(gone(pid) for pid in pids), 5)
    assert not Path(folder).exists()
    assert not [file for file in files if Path(file).exists()]
    engine.close()
    engine.close()


def test_an_engine_that_cannot_start_quotes_its_log(folders, tmp_path):
    for file in folders[0].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(EngineError, match="did not start") as caught:
        start_engine(tmp_path, kind="transformers", log=tmp_path / "engine.log", threads=1)
    assert "model.safetensors" in str(caught.value) and str(tmp_path / "engine.log") in str(caught.value)


def test_misfits_are_refused_before_anything_starts(folders, tmp_path):
    with HiddenPool.create(rows=8, width=32, dtype="float32") as pool:
        with pytest.raises(ValueError, match="hidden rows of 64 numbers, the pool's have 32"):
            start_engine(folders[0], log=tmp_path / "log", pool=pool)
    with HiddenPool.create(rows=8, width=64, dtype="float32") as pool:
        with pytest.raises(ValueError, match="they must agree"):
            start_engine(folders[0], log=tmp_path / "log", pool=pool, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["transformers", pytest.param("sglang", marks=pytest.mark.full)])
def test_a_killed_trainer_takes_its_engine_and_pool_with_it(folders, tmp_path, kind):
    script = f"""
        import os, signal
        from bridge.client import start_engine
        from bridge.hidden_pool import HiddenPool
        from processes import family
        pool = HiddenPool.create(rows=8, width=64, dtype="float32")
        options = {OPTIONS[kind]!r}
        log = {str(tmp_path / "log")!r}
        engine = start_engine({str(folders[0])!r}, kind={kind!r}, log=log, pool=pool, options=options)
        print(*family(engine.pid), engine._server.folder, *engine._server.leftovers, pool.spec.path, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = os.environ | {"PYTHONPATH": ENVIRONMENT["PYTHONPATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    words = done.stdout.split()
    pids, files = [int(word) for word in words if word.isdigit()], [word for word in words if not word.isdigit()]
    assert len(pids) >= (3 if kind == "sglang" else 1) and len(files) >= 2
    wait_until(lambda: all(gone(pid) for pid in pids), 10)
    assert not [file for file in files if Path(file).exists()]
