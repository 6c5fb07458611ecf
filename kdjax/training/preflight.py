"""Truth at the border: two programs that hold one model must give one set of log-probabilities.

Before step 1 the teacher's hidden rows, sent through the teacher's head here, are compared with what the engine itself
says; after export, transformers' log-probabilities are compared with the student's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from bridge.client import start_engine
from bridge.engine import Prefill
from kdjax.errors import UserError
from kdjax.training.samples import Sample, answer_samples

SAMPLE_DOCUMENTS, SAMPLE_TOKENS = 4, 128


def check_teacher(stream: Any) -> float:
    """Compare recomputed with the engine's own log-probabilities on a few training documents.

    Returns the largest difference in nats. Raises UserError above 1e-3 in float32; above 0.03 on average or 0.3 at
    most in bfloat16: a wrong head, a missing soft-cap, another vocabulary or stale weights would train on nonsense.
    """
    documents = _sample(stream)
    theirs = stream.engine.score(documents)
    rows = [len(ids) - 1 for ids in documents]
    lease = stream.pool.lease([sum(rows)], timeout=stream.config.teacher.timeout)
    try:
        starts = lease.starts[0] + np.concatenate([[0], np.cumsum(rows)[:-1]])
        stream.engine.prefill(
            [
                Prefill(ids=ids, spans=((0, n),), row=int(start))
                for ids, n, start in zip(documents, rows, starts, strict=True)
            ]
        )
        view = lease.view(0, device=stream.mesh.local_devices[0].local_hardware_id)
        hidden = jnp.array(jax.dlpack.from_dlpack(view, copy=False), copy=True).block_until_ready()
    finally:
        lease.release()
    hidden = jax.device_put(hidden, NamedSharding(stream.mesh, P()))
    head = stream.teachers[0].head
    labels = np.concatenate([ids[1:] for ids in documents])
    with jax.set_mesh(stream.mesh):
        ours = np.asarray(_log_probabilities(hidden, head, labels))
    gap = np.abs(ours - np.concatenate(theirs))
    limit_mean, limit_max = (1e-3, 1e-3) if hidden.dtype == jnp.float32 else (0.03, 0.3)
    if not (gap.mean() <= limit_mean and gap.max() <= limit_max):
        raise UserError(
            f"preflight: log-probabilities recomputed from the teacher's hidden rows differ from the engine's own by "
            f"{gap.mean():.3g} nats on average and {gap.max():.3g} at most (allowed {limit_mean} and {limit_max}); "
            f"the head in {stream.teachers[0].path} is not the one that the engine runs"
        )
    return float(gap.max())


def check_export(stream: Any, model: nnx.Module, folder: Path) -> tuple[float, list[Sample]]:
    """Load the exported folder in plain transformers; compare log-probabilities and answer the sample questions.

    Returns the largest difference in nats on a few documents, and the answers.
    """
    documents = _sample(stream)
    length = max(len(ids) for ids in documents)
    tokens = np.zeros((len(documents), length), np.int32)
    for row, ids in zip(tokens, documents, strict=True):
        row[: len(ids)] = ids
    with jax.set_mesh(stream.mesh):
        hidden = jax.jit(lambda m, t: m(t))(model, tokens)
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        ours = np.asarray(_log_probabilities(flat, model.head(), tokens[:, 1:].reshape(-1))).reshape(len(tokens), -1)
    with start_engine(folder, kind="transformers", dtype="float32", log=folder.parent / "export.log") as engine:
        theirs = engine.score(documents)
        samples = answer_samples(engine, stream)
    gap = max(np.abs(o[: len(t)] - t).max() for o, t in zip(ours, theirs, strict=True))
    return float(gap), samples


def _sample(stream: Any) -> list[np.ndarray]:
    return [document.ids[:SAMPLE_TOKENS] for document in stream.documents(SAMPLE_DOCUMENTS)]


@jax.jit
def _log_probabilities(hidden: jax.Array, head: Any, labels: jax.Array) -> jax.Array:
    """log p(label) of [N, D] rows under the head's own full softmax, float32 [N]."""
    logits = head.logits(hidden)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
