"""Does the hook know where every computed row belongs, however SGLang batches and chunks the prompts?"""

import numpy as np
import pytest
from engine_models import random_spans

from bridge.sglang_hook import plan, request_id


def test_ids_of_one_call_and_of_two_calls_differ():
    spans = ((0, 3), (5, 6))
    ids = {request_id(call, index, row, spans) for call in (1, 2) for index in (0, 1) for row in (0, 9)}
    assert len(ids) == 8


def test_foreign_requests_take_room_and_write_nothing():
    rids = ["3f2a77", request_id(1, 0, 40, ((1, 3),)), "kdjax-lookalike:1:2:3:0-4"]
    assert plan(rids, [0, 0, 0], [10, 4, 5]).tolist() == [[11, 40, 2]]
    assert plan(["3f2a77"], [0], [10]).shape == (0, 3)


def test_a_one_token_prompt():
    assert plan([request_id(1, 0, 7, ((0, 1),))], [0], [1]).tolist() == [[0, 7, 1]]


def test_a_chunk_writes_its_own_positions_only():
    rid = request_id(1, 0, 100, ((2, 5), (6, 9)))
    assert plan([rid], [0], [4]).tolist() == [[2, 100, 2]]
    assert plan([rid], [4], [3]).tolist() == [[0, 102, 1], [2, 103, 1]]
    assert plan([rid], [7], [3]).tolist() == [[0, 104, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_random_batches_and_chunks_write_each_row_once(seed):
    """simulates a scheduler: each forward pass takes the next chunk of some prompts, in any order"""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, 9)
    spans = [random_spans(rng, int(length)) for length in lengths]
    counts = [sum(stop - start for start, stop in one) for one in spans]
    rows = np.cumsum([0, *counts])
    rids = [request_id(1, index, int(rows[index]), one) for index, one in enumerate(spans)]
    pool = np.full((rows[-1], 2), -1)
    done = np.zeros(len(lengths), int)
    while (done < lengths).any():
        batch = rng.permutation(np.flatnonzero(done < lengths))[: rng.integers(1, 5)]
        chunks = [int(rng.integers(1, lengths[i] - done[i] + 1)) for i in batch]
        hidden = np.concatenate(  # a row says which prompt and position it is
            [np.stack([np.full(n, i), done[i] + np.arange(n)], 1) for i, n in zip(batch, chunks, strict=True)]
        )
        for source, row, count in plan([rids[i] for i in batch], done[batch].tolist(), chunks):
            assert (pool[row : row + count] == -1).all()
            pool[row : row + count] = hidden[source : source + count]
        done[batch] += chunks
    expected = [(i, t) for i, one in enumerate(spans) for start, stop in one for t in range(start, stop)]
    assert pool.tolist() == [list(pair) for pair in expected]
