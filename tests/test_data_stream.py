"""the stream: one order whatever the threads, exact positions, honest numbers, little padding."""

import json
from collections import Counter

import jax
import numpy as np
import pytest
from data_tools import GSM8K, config, plain, write_pairs

from kdjax.config import SourceConfig
from kdjax.data import DataStream, eval_batches
from kdjax.errors import UserError

USER = {"role": "user", "content": "hi"}


def stream(data, **options):
    return DataStream(data, plain(), **{"batch": 2, "accumulate": 2, "seed": 5, **options})


def take(made, count):
    return [next(made) for _ in range(count)]


def same(a, b):
    """Equal to the bit: every array, where every document went, and the position afterwards."""
    leaves = zip(jax.tree.leaves(a.batch), jax.tree.leaves(b.batch), strict=True)
    places = [[(p.document.source, p.micro, p.shard, p.offset, p.row, p.start) for p in h.documents] for h in (a, b)]
    return (
        all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves)
        and places[0] == places[1]
        and a.state == b.state
    )


def sources_of(hosts):
    return [p.document.source for host in hosts for p in host.documents]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "rows.jsonl", 60)


@pytest.mark.parametrize("packing", [True, False])
def test_order_does_not_depend_on_threads(pairs, packing):
    runs = [take(stream(config(pairs, workers=workers, packing=packing)), 12) for workers in (1, 3)]
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


def test_the_seed_decides_the_order(pairs):
    first, again, other = (sources_of(take(stream(config(pairs), seed=seed), 3)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 7, 11])
def test_restored_streams_go_on_to_the_bit(pairs, packing, stop):
    # A group is 4 rows and a batch 2, so odd stops lie inside a pack; 60 rows make an epoch of about 9 batches.
    data = config(pairs, packing=packing)
    whole = stream(data, batch=1)
    before, after = take(whole, stop), take(whole, 6)
    state = json.loads(json.dumps(before[-1].state))
    resumed = stream(data, batch=1)
    resumed.restore(state)
    assert resumed.state() == state
    assert all(same(a, b) for a, b in zip(after, take(resumed, 6), strict=True))
    assert resumed.statistics == whole.statistics


def test_a_state_fits_other_batch_shapes(pairs):
    data = config(pairs)
    rows = [h.batch.tokens for h in take(stream(data, batch=1, accumulate=1), 24)]
    half = stream(data, batch=4, accumulate=1)
    take(half, 2)
    resumed = stream(data, batch=2, accumulate=4, shards=2)
    resumed.restore(half.state())
    found = np.concatenate([h.batch.tokens.reshape(-1, 64) for h in take(resumed, 2)])
    expected = np.concatenate(rows)[8:24].reshape(-1, 64)
    assert sorted(map(bytes, found)) == sorted(map(bytes, expected))


def test_state_of_other_data_is_refused(pairs, tmp_path):
    state = next(stream(config(pairs))).state
    with pytest.raises(UserError, match="number of rows in the sources was .60. when.* and is .50. now"):
        stream(config(write_pairs(tmp_path / "other.jsonl", 50))).restore(state)
    with pytest.raises(UserError, match="the seed was 5 .* and is 6 now"):
        stream(config(pairs), seed=6).restore(state)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_row_once_and_each_has_its_own_order(pairs, packing):
    data = config(pairs, packing=packing)
    once = sources_of(stream(data, epochs=1))
    assert len(once) == 60 and len(set(once)) == 60
    assert set(Counter(sources_of(stream(data, epochs=2))).values()) == {2}
    half = sources_of(stream(data, epochs=0.5))
    assert len(half) == len(set(half)) == 30
    if not packing:
        epochs = sources_of(stream(data, epochs=2, accumulate=1, batch=1))
        assert sorted(epochs[:60]) == sorted(epochs[60:]) and epochs[:60] != epochs[60:]
        in_order = sources_of(stream(config(pairs, packing=False, shuffle=False), epochs=1, accumulate=1, batch=1))
        assert [int(name.rpartition(":")[2]) for name in in_order] == list(range(1, 61))


def test_the_last_batch_is_filled_with_padding(pairs):
    hosts = list(stream(config(pairs, packing=False), epochs=1, batch=8, accumulate=1))
    assert [len(h.documents) for h in hosts] == [8] * 7 + [4]
    assert len({h.batch.tokens.shape for h in hosts}) == 1
    assert hosts[-1].batch.mask.sum() == sum(len(p.document.labels) for p in hosts[-1].documents)
    assert len({h.batch.rows.shape for h in hosts}) == 1  # a size that is compiled already serves the last one too


def test_sources_are_mixed_by_weight(tmp_path):
    paths = [write_pairs(tmp_path / f"{tag}.jsonl", 40, tag=tag) for tag in "ab"]
    weighed = [SourceConfig(path=str(path), weight=weight) for path, weight in zip(paths, (3.0, 1.0), strict=True)]
    mixed = config(*weighed, packing=False)
    names = sources_of(take(stream(mixed), 40))
    shares = Counter(name.rpartition("/")[2][0] for name in names)
    assert shares == {"a": 120, "b": 40}
    seen = Counter(name for name in names if "a.jsonl" in name)
    assert set(seen.values()) == {3}  # each of its rows as often as the others
    one_epoch = list(stream(mixed, epochs=1))
    assert len(sources_of(one_epoch)) == 80
    resumed = stream(mixed, epochs=1)
    resumed.restore(one_epoch[4].state)
    assert all(same(a, b) for a, b in zip(one_epoch[5:], resumed, strict=True))


def test_counts_of_what_was_left_out(tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": "ho " * n}]} for n in (2, 80)]
    rows += [{"messages": [{"role": "user", "content": "nobody answers"}]}, {"messages": "?"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = stream(config(path, on_bad_row="skip"), epochs=1)
    hosts = list(made)
    seen = made.statistics
    assert (seen.rows, seen.documents, seen.skipped, seen.dropped, seen.without_loss) == (4, 1, 1, 1, 1)
    assert (seen.batches, seen.tokens, seen.positions) == (1, hosts[0].tokens, 4 * 64)
    assert seen.padding == pytest.approx(hosts[0].padding / (4 * 64)) and seen.longest > 80
    assert hosts[0].report == {"data/skipped": 1.0, "data/dropped": 1.0, "data/without_loss": 1.0}
    assert (
        "the first malformed row is left out; data/skipped counts them" in hosts[0].notes and len(hosts[0].notes) == 3
    )
    endless = stream(config(path, on_bad_row="skip"))
    assert next(endless).notes and not next(endless).notes  # told once, and counted on
    cut = stream(config(path, on_bad_row="skip", on_long_row="truncate"), epochs=1)
    lengths = sorted(len(p.document) for host in cut for p in host.documents)
    assert lengths[-1] == 64 and cut.statistics.truncated == 1 and cut.statistics.dropped == 0


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": "a", "response": "so " * 90}, {}, r"12 longer than data.max_len=64 .the longest has 1\d\d tokens"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "12 without a token that carries loss"),
        ({"prompt": "so " * 90, "response": "a"}, {"on_long_row": "truncate"}, "12 without a token that carries loss"),
        ({"prompt": 1, "response": "a"}, {"on_bad_row": "skip"}, "12 malformed"),
    ],
)
@pytest.mark.parametrize("epochs", [None, 1])
def test_data_with_nothing_to_train_on(tmp_path, row, settings, message, epochs):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 12)
    with pytest.raises(UserError, match="none of the 12 rows can be trained on: " + message):
        next(stream(config(path, **settings), epochs=epochs))


def test_the_teachers_longer_prompt_counts_as_length(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "response": f"{i}", "hint": "so " * n} for i, n in enumerate((2, 90, 3))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = stream(config(SourceConfig(path=str(path), teacher_input_key="hint")), epochs=1)
    documents = [p.document for host in made for p in host.documents]
    assert len(documents) == 2 and made.statistics.dropped == 1
    for document in documents:
        ids, spans = document.teacher_request
        assert len(ids) <= 64 and sum(stop - start for start, stop in spans) == len(document.labels)


def test_gsm8k_packs_with_little_padding(root):
    source = SourceConfig(path=str(root / "examples/data/gsm8k_train.jsonl"), max_samples=1500, **GSM8K)
    made = stream(config(source, max_len=512, packing_bins=32), batch=8, accumulate=2, shards=2, epochs=1)
    hosts = list(made)
    assert made.statistics.documents >= 1490 and made.statistics.padding < 0.06
    assert len({h.batch.rows.shape for h in hosts}) <= 2
    unpacked = config(source, max_len=512, packing=False)
    assert next(stream(unpacked, batch=8)).padding / (8 * 2 * 512) > 0.4
    assert abs(made.estimate_batches(1, sample=300) - len(hosts)) <= 0.05 * len(hosts)


def test_estimates_are_exact_without_packing(pairs):
    made = stream(config(pairs, packing=False))
    assert made.estimate_batches(1) == 15 and made.estimate_batches(2.5) == 38
    assert len(list(stream(config(pairs, packing=False), epochs=2.5))) == 38


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_covers_every_row_once(pairs, packing):
    data = config(SourceConfig(path=str(pairs), weight=2.0), packing=packing)
    hosts = eval_batches(data, plain(), batch=4, shards=2, sources=data.train)
    names = sources_of(hosts)
    assert len(names) == len(set(names)) == 60
    assert len({h.batch.tokens.shape for h in hosts}) == 1 and hosts[0].batch.tokens.shape == (1, 4, 64)
    few = sources_of(eval_batches(data, plain(), batch=4, sources=data.train, max_rows=7))
    assert {int(name.rpartition(":")[2]) for name in few} == set(range(1, 8))


def test_rows_must_divide_over_shards(pairs):
    with pytest.raises(UserError, match="2 rows does not divide over 3 data shards"):
        stream(config(pairs), shards=3)
