"""The forward hook that SGLang loads: hidden rows that carry loss go from the model's output straight into the pool.

It is registered through SGLang's own option `forward_hooks` and runs in the scheduler's process. A request's id says
where its rows belong (`request_id`), so nothing but ids travels over SGLang's sockets and nothing is looked up. A
prompt may come in several chunks: each forward pass writes the rows of the positions it computed.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from bridge.cuda import gpus
from bridge.hidden_pool import PoolSpec
from bridge.pool_rows import PoolRows

PREFIX = "kdjax"


def request_id(call: int, index: int, row: int, spans: Sequence[tuple[int, int]]) -> str:
    """the id of prompt `index` of an engine's `call`-th prefill: unique, and it says where its rows belong"""
    return f"{PREFIX}:{call}:{index}:{row}:" + ",".join(f"{start}-{stop}" for start, stop in spans)


@lru_cache(maxsize=4096)
def _job(rid: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """spans' starts, stops and destination rows; None for a request that is not ours"""
    if not rid.startswith(f"{PREFIX}:"):
        return None
    *_, row, text = rid.split(":")
    spans = np.array([span.split("-") for span in text.split(",")], np.int64)
    counts = spans[:, 1] - spans[:, 0]
    return spans[:, 0], spans[:, 1], int(row) + np.cumsum(counts) - counts


def plan(rids: Sequence[str], prefixes: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """what to copy after one forward pass: int64 [copies, 3] of source row, destination row, rows

    rids: the batch's requests; prefixes: positions each had computed before; lengths: positions computed now, whose
    rows lie one request after the other in the output.
    """
    copies = [np.empty((0, 3), np.int64)]
    offset = 0
    for rid, prefix, length in zip(rids, prefixes, lengths, strict=True):
        if (job := _job(rid)) is not None:
            starts, stops, rows = job
            first, last = np.maximum(starts, prefix), np.minimum(stops, prefix + length)
            copy = np.stack([offset + first - prefix, rows + first - starts, last - first], axis=1)
            copies.append(copy[copy[:, 2] > 0])
        offset += length
    return np.concatenate(copies)


def write_rows(config: dict[str, Any]) -> Callable[..., None] | None:
    """SGLang's hook factory. config: `pool`, the fields of a PoolSpec as plain values

    After the final norm every tensor-parallel rank holds full rows: each writes the blocks of the pool that are its own
    (see `PoolRows`). Returns None, and so no hook, on a rank without any and on all but the last pipeline stage.
    """
    from sglang.srt.distributed.parallel_state import get_pp_group, get_tp_group
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    if not get_pp_group().is_last_rank:
        return None
    pool, group = PoolSpec.of(config["pool"]), get_tp_group()
    ranks = [gpus()[torch.cuda.current_device()] if pool.blocks else ""] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(ranks, ranks[0], group=group.cpu_group)
    rows = PoolRows(pool, group.rank_in_group, ranks)
    if not rows.writes:
        return None

    def hook(module: torch.nn.Module, args: tuple, output: Any) -> None:
        batch = next(value for value in args if isinstance(value, ForwardBatch))
        if not batch.forward_mode.is_extend() or not batch.rids:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if str(hidden.dtype) != f"torch.{pool.dtype}" or hidden.shape[1] != pool.width:
            raise TypeError(f"the model computes rows {hidden.dtype} [{hidden.shape[1]}], the pool holds {pool}")
        for source, row, count in plan(batch.rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu).tolist():
            rows.write(row, hidden[source : source + count])
        rows.finish()

    return hook
