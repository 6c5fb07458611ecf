"""documents are shifted once and laid out exactly: rows, labels, masks, segments, positions."""

import numpy as np
import pytest
from data_tools import document, drawn

from kdjax.data import Batch, bucket, collate
from kdjax.data.packing import pack
from kdjax.data.prepare import truncate


def test_five_tokens_by_hand():
    # prompt a b, response c EOS, then one token that the template adds
    a, b, c, eos, newline = 11, 12, 13, 2, 14
    made = document([a, b, c, eos, newline], [0, 0, 1, 1, 0])
    host = collate([[made]], batch=1, seq_len=8)
    batch = host.batch
    assert made.loss_rows.tolist() == [1, 2]  # b predicts c: the first response token contributes
    assert made.labels.tolist() == [c, eos]  # and the position of EOS predicts nothing
    assert made.teacher_request[1] == ((1, 3),)
    assert batch.rows[0, 0, :2].tolist() == [1, 2] and batch.labels[0, :2].tolist() == [c, eos]
    assert batch.mask[0].tolist() == [True, True]
    assert batch.tokens[0, 0].tolist() == [a, b, c, eos, newline, 0, 0, 0]
    assert batch.positions[0, 0].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert batch.segment_ids[0, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert (host.tokens, host.loss_tokens, host.padding) == (5, 2, 3)


def test_the_first_token_is_no_target():
    with pytest.raises(ValueError, match="first token carries no loss"):
        document([5, 6], [1, 1])


def test_spans_of_several_turns():
    made = document(range(10), [0, 0, 1, 1, 0, 0, 1, 0, 0, 1])
    assert made.teacher_request[1] == ((1, 3), (5, 6), (8, 9)) and made.teacher_request[0] is made.ids


def test_teacher_must_train_on_the_same_tokens():
    teacher = document([7, 8, 9, 3, 4], [0, 0, 0, 1, 1])
    made = document([1, 3, 4], [0, 1, 1], teacher_ids=teacher.ids, teacher_loss=teacher.loss)
    assert made.teacher_request[1] == ((2, 4),) and made.loss_rows.tolist() == [0, 1]
    with pytest.raises(ValueError, match="differ from the student's"):
        document([1, 3, 5], [0, 1, 1], teacher_ids=teacher.ids, teacher_loss=teacher.loss)


@pytest.mark.parametrize(("accumulate", "batch", "shards"), [(1, 4, 1), (2, 4, 2), (3, 8, 4), (1, 8, 8)])
def test_a_packed_batch_holds_exactly_its_parts(accumulate, batch, shards):
    rng, seq_len = np.random.default_rng(batch + shards), 32
    documents = [drawn(rng, int(rng.integers(2, 20))) for _ in range(accumulate * batch * 2)]
    filled, _ = pack([len(d) for d in documents], rows=accumulate * batch, seq_len=seq_len)
    host = collate(
        [[documents[i] for i in row] for row in filled],
        batch=batch, seq_len=seq_len, accumulate=accumulate, shards=shards,
    )  # fmt: skip
    arrays, per_shard = host.batch, batch // shards
    assert arrays.tokens.shape == (accumulate, batch, seq_len)
    assert arrays.rows.shape[:2] == (accumulate, shards) and arrays.labels.shape == arrays.mask.shape
    assert len(host.documents) == sum(map(len, filled))
    covered, targets = np.zeros(arrays.tokens.shape, int), 0
    labels = arrays.labels.reshape(arrays.rows.shape)
    for placed in host.documents:
        made = placed.document
        here = (placed.micro, placed.row, slice(placed.start, placed.start + len(made)))
        assert np.array_equal(arrays.tokens[here], made.ids)
        assert np.array_equal(arrays.positions[here], np.arange(len(made)))
        assert len(set(arrays.segment_ids[here].tolist())) == 1 and arrays.segment_ids[here][0] > 0
        covered[here] += 1
        assert placed.row // per_shard == placed.shard
        there = (placed.micro, placed.shard, slice(placed.offset, placed.offset + len(made.labels)))
        assert np.array_equal(labels[there], made.labels)
        in_shard = (placed.row % per_shard) * seq_len + placed.start
        assert np.array_equal(arrays.rows[there], in_shard + made.loss_rows)
        targets += len(made.labels)
    assert np.array_equal(covered > 0, arrays.segment_ids > 0) and covered.max() == 1
    assert not arrays.tokens[covered == 0].any() and not arrays.positions[covered == 0].any()
    assert arrays.mask.sum() == targets == host.loss_tokens
    assert host.tokens == covered.sum() and host.padding == covered.size - covered.sum()


def test_labels_never_cross_segments():
    rng, seq_len, shards = np.random.default_rng(0), 24, 2
    rows = [[drawn(rng, 8) for _ in range(3)] for _ in range(4)]
    batch = collate(rows, batch=4, seq_len=seq_len, shards=shards).batch
    tokens = batch.tokens.reshape(shards, -1)
    segments = (batch.segment_ids + 100 * np.arange(4)[None, :, None]).reshape(shards, -1)
    mask = batch.mask.reshape(shards, -1)
    for g in range(shards):
        at = batch.rows[0, g][mask[g]]
        assert np.array_equal(segments[g, at], segments[g, at + 1])
        assert np.array_equal(tokens[g, at + 1], batch.labels.reshape(shards, -1)[g][mask[g]])


def test_shards_and_micro_batches_get_nearly_the_same_work():
    rng = np.random.default_rng(1)
    rows = [[drawn(rng, 32)] for _ in range(64)]
    batch = collate(rows, batch=16, seq_len=32, accumulate=4, shards=4).batch
    counts = batch.mask.reshape(4, 4, -1).sum(-1)
    assert counts.max() - counts.min() <= 0.1 * counts.mean()


def test_where_loss_rows_are_equal_teachers_read_as_many_tokens():
    read = document([0] * 18 + [1], [0] * 18 + [1])
    lengths = [2, 3, 8, 11, 20]
    rows = [[document([0] * (n - 1) + [1], [0] * (n - 1) + [1])] for n in lengths]
    rows += [[document([0, 1], [0, 1], teacher_ids=read.ids, teacher_loss=read.loss)]]
    host = collate(rows, batch=6, seq_len=32, shards=2)
    tokens = [sum(len(p.document.teacher_request[0]) for p in host.documents if p.shard == g) for g in (0, 1)]
    assert host.batch.mask.sum() == 6 and tokens == [31, 32]


def test_shards_get_as_many_tokens_to_read_as_rows_to_learn_from():
    """whatever the length of prompts and answers: neither teachers nor heads wait for one shard"""
    rng = np.random.default_rng(0)
    sizes = zip(rng.integers(1, 4000, 32), rng.integers(1, 200, 32), strict=True)
    rows = [[document([1] * (prompt + answer), [0] * prompt + [1] * answer)] for prompt, answer in sizes]
    host = collate(rows, batch=32, seq_len=4200, shards=4)
    for size in (lambda d: len(d), lambda d: len(d.labels)):
        each = [sum(size(p.document) for p in host.documents if p.shard == g) for g in range(4)]
        assert max(each) < 1.08 * np.mean(each)


def test_loss_rows_take_few_static_sizes():
    sizes = {bucket(n, 1000) for n in range(1001)}
    assert len(sizes) == 8 and max(sizes) == 1000
    assert all(min(1000, n + n // 8) <= bucket(n, 1000) <= max(125, n + n // 8 + 125) for n in range(1001))
    assert bucket(1, 3) == 1 and bucket(0, 3) == 1
    assert bucket(100, 1000, known=(500, 250, 1000)) == 250  # a compiled step is used again
    assert bucket(600, 1000, known=(250,)) == 750


def test_missing_rows_are_padding():
    host = collate([[document([5, 6], [0, 1])]], batch=4, seq_len=4, accumulate=2, shards=2)
    assert host.batch.mask.sum() == 1 and (host.batch.segment_ids > 0).sum() == 2


def test_truncation_keeps_student_and_teacher_in_step():
    made = document([1, 2, 3, 4, 5], [0, 0, 1, 1, 1])
    assert truncate(made, 4).labels.tolist() == [3, 4] and len(truncate(made, 4)) == 4
    assert truncate(made, 2) is None
    long = document([1, 3, 4, 5], [0, 1, 1, 1], teacher_ids=np.array([9, 9, 9, 3, 4, 5], np.int32),
                    teacher_loss=np.array([0, 0, 0, 1, 1, 1], bool))  # fmt: skip
    cut = truncate(long, 4)  # the teacher's prompt leaves room for one loss token
    assert cut.labels.tolist() == cut.teacher_labels.tolist() == [3]
    assert len(cut.teacher_ids) <= 4 and truncate(long, 3) is None


def test_packing_prefers_what_was_left_over():
    filled, left = pack([3, 3, 8, 8], rows=2, seq_len=8, first=2)
    assert filled == [[0, 1], [2]] and left == [3]


def test_packing_places_everything_once():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 64, 200).tolist()
    filled, left = pack(lengths, rows=60, seq_len=64)
    assert sorted([i for row in filled for i in row] + left) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 64 for row in filled)


def test_gather_takes_loss_rows_of_each_shard():
    import jax

    rng, seq_len, shards = np.random.default_rng(2), 16, 2
    rows = [[drawn(rng, 12)] for _ in range(4)]
    stacked = collate(rows, batch=4, seq_len=seq_len, shards=shards).batch
    batch = jax.tree.map(lambda x: x[0], stacked)
    x = rng.standard_normal((4, seq_len, 3)).astype(np.float32)
    expected = np.concatenate([x.reshape(shards, -1, 3)[g][batch.rows[g]] for g in range(shards)])
    assert np.array_equal(batch.gather(x), expected)


def test_gather_and_its_gradient_stay_on_their_shard():
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P

    from kdjax.sharding import make_mesh

    mesh = make_mesh(data=4, fsdp=2)
    rng, seq_len = np.random.default_rng(4), 16
    rows = [[drawn(rng, 12)] for _ in range(16)]
    stacked = collate(rows, batch=16, seq_len=seq_len, shards=8).batch
    over = ("data", "fsdp")

    def put(x):
        return jax.device_put(x, NamedSharding(mesh, P(over, *[None] * (x.ndim - 1))))

    batch = jax.tree.map(lambda x: put(x[0]), stacked)
    x = rng.standard_normal((16, seq_len, 4)).astype(np.float32)

    def value(x, batch: Batch):
        return jnp.sum(jnp.where(batch.mask[:, None], batch.gather(x), 0) ** 2)

    compiled = jax.jit(jax.grad(value)).lower(put(x), batch).compile()
    text = compiled.as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text
    expected = np.zeros_like(x)
    for placed in (p for p in collate(rows, batch=16, seq_len=seq_len, shards=8).documents):
        at = placed.start + placed.document.loss_rows
        expected[placed.row, at] = 2 * x[placed.row, at]
    np.testing.assert_allclose(compiled(put(x), batch), expected, rtol=1e-6)
