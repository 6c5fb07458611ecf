"""Batches by a budget of tokens: nothing twice, nothing lost, few shapes, the position kept, the loss unchanged."""

import json
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from data_tools import GSM8K, config, plain, write_pairs
from run_tools import go, losses, without_teacher
from step_tools import SHAPE

from kdjax.algorithms import make_algorithm
from kdjax.config import SourceConfig, from_dict
from kdjax.data import DataStream, collate
from kdjax.data.budget import SHAPES, TokenBudget
from kdjax.errors import UserError
from kdjax.models import load_model
from kdjax.training.optimizer import make_optimizer
from kdjax.training.sources import Stream, to_device
from kdjax.training.step import make_step

BUDGET = 512


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    words = lambda i: 1 + (i * 7) % 39 if i % 4 == 0 else i % 8  # noqa: E731  a few are long
    return write_pairs(tmp_path_factory.mktemp("pairs") / "rows.jsonl", 150, words=words)


def stream(path, **options):
    data = config(path, packing=False)
    return DataStream(data, plain(), **{"tokens_per_batch": BUDGET, "seed": 5, **options})


def names(hosts):
    return [p.document.source for host in hosts for p in host.documents]


@pytest.mark.parametrize("max_len", [2, 37, 64, 1000, 4096, 32768])
@pytest.mark.parametrize(("accumulate", "shards"), [(1, 1), (2, 4)])
def test_rows_are_many_or_long(max_len, accumulate, shards):
    budget = TokenBudget(5 * accumulate * shards * max_len, max_len, accumulate, shards)
    lengths = budget.lengths
    assert len(lengths) <= SHAPES and list(lengths) == sorted(set(lengths)) and lengths[-1] == max_len
    for length in lengths:
        positions = budget.documents(length) * length
        assert budget.tokens - accumulate * shards * length < positions <= budget.tokens
        assert budget.rows(length) % shards == 0
    for tokens in range(1, max_len + 1, max(1, max_len // 100)):
        assert tokens <= budget.fit(tokens) <= max(lengths[0], 2 * tokens)


def test_the_oldest_goes_first_with_its_like():
    budget = TokenBudget(128, 64)
    assert budget.lengths == (8, 16, 24, 32, 48, 64)
    assert budget.choose([30, 5, 40, 31, 25, 26, 64]) == (32, [0, 3, 4, 5])  # four rows of 32; 40 and 64 do not fit
    assert budget.choose([60, 3, 20, 21]) == (64, [0, 3])  # nobody like it waits, so the longest shorter one goes along
    assert budget.choose([60]) == (64, [0])


def test_an_epoch_holds_every_row_once_in_few_shapes(pairs):
    made = stream(pairs, epochs=2)
    hosts = list(made)
    shapes = {host.batch.tokens.shape for host in hosts}
    assert 2 < len(shapes) <= SHAPES and all(np.prod(shape) <= BUDGET for shape in shapes)
    assert len({(host.batch.tokens.shape, host.batch.rows.shape) for host in hosts}) <= 2 * len(shapes)
    halves = names(hosts)[:150], names(hosts)[150:]
    assert sorted(halves[0]) == sorted(halves[1]) and len(set(halves[0])) == 150 and halves[0] != halves[1]
    assert made.statistics.padding < 0.35
    fixed = DataStream(config(pairs, packing=False), plain(), batch=8, epochs=1)
    list(fixed)
    assert fixed.statistics.padding > 0.5
    # What is left at the end of an epoch fills its batches in part, at most one a length; the estimate counts none.
    assert len(hosts) - 2 * len(shapes) <= made.estimate_batches(2) <= len(hosts)


def test_gsm8k_needs_half_the_positions_of_whole_rows(root):
    source = SourceConfig(path=str(root / "examples/data/gsm8k_train.jsonl"), max_samples=1500, **GSM8K)
    made = DataStream(config(source, max_len=512, packing=False), plain(), tokens_per_batch=8192, shards=2, epochs=1)
    hosts = list(made)
    assert made.statistics.documents >= 1490 and made.statistics.padding < 0.25
    lengths = [host.batch.tokens.shape[-1] for host in hosts]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)  # long and short in turn
    per_shard = [host.batch.mask.reshape(2, -1).sum(1) for host in hosts[:-4]]
    assert max(abs(int(a) - int(b)) / (a + b) for a, b in per_shard) < 0.05


def test_the_seed_alone_decides_the_order(pairs):
    first, again, other = (names(next(stream(pairs, seed=seed)) for _ in range(3)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("stop", [1, 2, 7, 12, 20])
def test_restored_streams_go_on_to_the_bit(pairs, stop):
    whole = stream(pairs)
    before, after = [next(whole) for _ in range(stop)], [next(whole) for _ in range(8)]
    resumed = stream(pairs)
    resumed.restore(json.loads(json.dumps(before[-1].state)))
    for expected in after:
        host = next(resumed)
        leaves = zip(jax.tree.leaves(host.batch), jax.tree.leaves(expected.batch), strict=True)
        assert all(np.array_equal(a, b) for a, b in leaves)
        assert host.state == expected.state


def test_other_shards_lose_nothing(pairs):
    whole = stream(pairs, epochs=1)
    seen = [next(whole) for _ in range(5)]
    resumed = stream(pairs, epochs=1, accumulate=2, shards=4)
    resumed.restore(seen[-1].state)
    counted = Counter(names(seen) + names(resumed))
    assert len(counted) == 150 and set(counted.values()) == {1}


def test_losses_are_those_of_documents_one_by_one(pairs):
    """The same weights, a batch of several shapes at once or each document in a row that just holds it."""
    settings = from_dict({"student": {"init": "random", "config": SHAPE}, "distill": {"algorithm": "sft"},
                          "data": {"train": [{"path": "none"}], "tokenizer": "none"}})  # fmt: skip
    shape = SHAPE | {"vocab_size": 4096}
    model = load_model(None, config=shape, init="random", seed=3)
    algorithm = make_algorithm(settings, model)
    alone = jax.jit(lambda batch: algorithm(model, batch))
    step = make_step(
        load_model(None, config=shape, init="random", seed=3), algorithm, make_optimizer(settings.train, 9)
    )
    host = next(stream(pairs, accumulate=2, shards=1))
    total = count = 0.0
    for placed in host.documents:
        batch = collate([[placed.document]], batch=1, seq_len=64).batch
        terms = alone(jax.tree.map(lambda x: x[0], batch))
        (term,) = terms.values()
        total, count = total + float(term.sum), count + float(term.count)
    metrics = step(to_device(host.batch, step.mesh))
    assert float(metrics["loss_tokens"]) == count == host.loss_tokens
    assert float(metrics["loss"]) == pytest.approx(total / count, rel=1e-5)


@pytest.fixture
def budgeted(run_values):
    """A run whose rows are long or many."""
    run_values["data"] |= {"packing": False, "eval": []}
    run_values["train"] = {"steps": 4, "tokens_per_batch": 1024, "learning_rate": 3e-3}
    return run_values


@pytest.mark.usefixtures("devices_as_asked")
def test_an_interrupted_run_goes_on_with_the_same_losses(budgeted):
    budgeted["checkpoint"] |= {"save_every": 2, "keep": 3}
    result = go(without_teacher(budgeted))
    run = Path(budgeted["output"])
    first = losses(run)
    shutil.rmtree(run / "checkpoints" / "4")
    shutil.rmtree(result.export)
    go(budgeted)
    assert losses(run) == first and len(first) == 4


@pytest.mark.usefixtures("devices_as_asked")
def test_the_teachers_rows_follow_the_shapes(budgeted, tmp_path, local_engines):
    with Stream(from_dict(budgeted), log=tmp_path / "engine.log") as batches:
        shapes = set()
        for _ in range(4):
            batch = next(batches)
            hidden, host = batch.arrays.teacher_hidden[0], batch.host
            shapes.add(host.batch.tokens.shape)
            assert hidden.shape[:2] == host.batch.mask.shape and batch.arrays.segment_ids is None
            assert np.all(np.any(np.array(hidden)[host.batch.mask] != 0, axis=-1))
            batch.release_after(jax.numpy.zeros(()))
    assert len(shapes) > 1


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"train": {"tokens_per_batch": 2048, "batch_size": 4}}, "both say how large a batch is; keep one"),
        ({"train": {"tokens_per_batch": 2048}, "data": {"packing": True}}, "set data.packing=false"),
        ({"train": {"tokens_per_batch": 2048}, "distill": {"on_policy_fraction": 0.5}}, "set train.batch_size"),
    ],
)
def test_what_cannot_work_is_refused(groups, words):
    values = {"student": {"path": "s"}, "data": {"train": [{"path": "rows.jsonl"}], "packing": False}}
    with pytest.raises(UserError, match=words):
        from_dict(values | {name: values.get(name, {}) | entries for name, entries in groups.items()})


def test_a_budget_below_one_row_is_refused(pairs):
    with pytest.raises(UserError, match="tokens_per_batch=500 leaves no row .* make it at least 512"):
        stream(pairs, tokens_per_batch=500, shards=4, accumulate=2)
