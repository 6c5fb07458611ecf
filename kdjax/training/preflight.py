"""Truth at the border: two programs that hold one model must give one set of log-probabilities.

Before step 1 the teacher's hidden rows, sent through the teacher's head here, are compared with what the engine itself
says; after export, transformers' log-probabilities are compared with the student's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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
from kdjax.training.templates import check_end

SAMPLE_DOCUMENTS, SAMPLE_TOKENS = 4, 128
# Nats: the mean and the largest difference. What is computed or stored in bfloat16 keeps 8 bits of each number, so two
# programs that round at other places are this far apart.
LIMITS = {"float32": (1e-3, 1e-3), "bfloat16": (0.03, 0.3)}
# A GPU's usual products of float32 are TF32's, of 10 bits, which alone would be beyond the limits.
exactly = partial(jax.default_matmul_precision, "highest")
EXPORT_LIMITS = {"float32": (1e-4, 1e-4), "bfloat16": LIMITS["bfloat16"]}


def check_teacher(stream: Any) -> float:
    """Compare recomputed with the engine's own log-probabilities on a few training documents.

    Returns the largest difference in nats. Raises UserError above 1e-3 in float32; above 0.03 on average or 0.3 at
    most in bfloat16: a wrong head, a missing soft-cap, another vocabulary or stale weights would train on nonsense.
    """
    documents = _sample(stream)
    stream.turns.enter("prefill")
    theirs = stream.engine.revived.ask(lambda engine: engine.score(documents))
    rows = [len(ids) - 1 for ids in documents]
    lease = stream.engine.pool.lease([sum(rows)], timeout=stream.config.teacher.timeout)
    try:
        starts = lease.starts[0] + np.concatenate([[0], np.cumsum(rows)[:-1]])
        prompts = [
            Prefill(ids=ids, spans=((0, n),), row=int(start))
            for ids, n, start in zip(documents, rows, starts, strict=True)
        ]
        stream.engine.revived.ask(lambda engine: engine.prefill(prompts))
        view = lease.view(0, device=stream.mesh.local_devices[0].local_hardware_id)
        hidden = jnp.array(jax.dlpack.from_dlpack(view, copy=False), copy=True).block_until_ready()
    finally:
        lease.release()
    stream.turns.enter("train")
    hidden = jax.device_put(hidden, NamedSharding(stream.mesh, P()))
    head = stream.teachers[0].head
    labels = np.concatenate([ids[1:] for ids in documents])
    with jax.set_mesh(stream.mesh), exactly():
        ours = np.asarray(_log_probabilities(hidden, head, labels))
    gap = np.abs(ours - np.concatenate(theirs))
    if beyond := _beyond(gap, LIMITS[hidden.dtype.name]):
        raise UserError(
            f"preflight: log-probabilities recomputed from the teacher's hidden rows differ from the engine's own by "
            f"{beyond}; the head in {stream.teachers[0].path} is not the one that the engine runs"
        )
    return float(gap.max())


@dataclass(frozen=True)
class Checked:
    """What plain transformers makes of an exported folder."""

    gap: float
    """The largest difference from the student's own log-probabilities on a few documents, in nats."""
    samples: list[Sample]
    """Its answers to the sample questions."""
    fault: UserError | None
    """Where ``gap`` is more than rounding explains."""


def check_export(stream: Any, model: nnx.Module, folder: Path) -> Checked:
    """Load the exported folder in plain transformers, float32 on the CPU, and compare log-probabilities.

    Allowed are 1e-4 nats; where the student computes in bfloat16, or float32 weights were stored in it, 0.03 on average
    and 0.3 at most.
    """
    documents = _sample(stream)
    ours = _scores(stream, model, documents)
    log = folder.parent / "export.log"
    # On the CPU: the devices' memory is JAX's and the engines'.
    with start_engine(folder, kind="transformers", dtype="float32", device="cpu", log=log) as engine:
        theirs = engine.score(documents)
        samples = answer_samples(engine, stream)
    gap = np.abs(ours - np.concatenate(theirs))
    student = stream.config.student
    exact = student.dtype == "float32" and student.export_dtype in (None, "float32", student.param_dtype)
    fault = None
    if beyond := _beyond(gap, EXPORT_LIMITS["float32" if exact else "bfloat16"]):
        fault = UserError(
            f"{folder} is written, but plain transformers' log-probabilities differ from the student's by {beyond}: it "
            f"is not the model that was trained, which the checkpoints hold (checkpoint.check_export)"
        )
    return Checked(float(gap.max()), samples, fault)


def check_student(stream: Any, step: Any) -> list[str]:
    """Wait for the student's engines, send them its weights, and compare what each says of prompts with the trainer.

    Returns what a person should know about how responses end. Raises UserError when both sides disagree by more than
    ``check_teacher`` allows, or when nothing would end a response.
    """
    students = stream.students
    students.wait_ready()
    students.follow()
    documents = _sample(stream)
    ours = _scores(stream, step.model, documents)
    theirs = students.score(documents)
    stream.turns.enter("train")
    exact = students.dtype == step.model.compute.dtype == "float32"
    for number, scores in enumerate(theirs):
        if beyond := _beyond(np.abs(ours - np.concatenate(scores)), LIMITS["float32" if exact else "bfloat16"]):
            raise UserError(
                f"preflight: the student's engine {number} gives log-probabilities that differ from the trainer's by "
                f"{beyond}; its weights did not arrive, or it computes otherwise than the student"
            )
    return check_end(stream.tokenizer, stream.config, students.stop_ids)


def _beyond(gap: np.ndarray, limits: tuple[float, float]) -> str | None:
    """How large the differences are, in words, where mean or largest is above its limit or not a number."""
    if gap.mean() <= limits[0] and gap.max() <= limits[1]:
        return None
    return f"{gap.mean():.3g} nats on average and {gap.max():.3g} at most (allowed {limits[0]} and {limits[1]})"


def _scores(stream: Any, model: nnx.Module, documents: list[np.ndarray]) -> np.ndarray:
    """The trainer's own log-probabilities of all documents' tokens but the first of each, one after the other."""
    tokens = np.zeros((len(documents), max(len(ids) for ids in documents)), np.int32)
    for row, ids in zip(tokens, documents, strict=True):
        row[: len(ids)] = ids
    with jax.set_mesh(stream.mesh), exactly():
        hidden = jax.jit(lambda m, t: m(t))(model, tokens)
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        found = np.asarray(_log_probabilities(flat, model.head(), tokens[:, 1:].reshape(-1))).reshape(len(tokens), -1)
    return np.concatenate([row[: len(ids) - 1] for row, ids in zip(found, documents, strict=True)])


def _sample(stream: Any) -> list[np.ndarray]:
    """Ids of a few training documents or prompts, of two tokens at least, so that each has a probability to compare."""
    documents = stream.documents(SAMPLE_DOCUMENTS)
    if not documents:
        raise UserError(
            "preflight: data.train has no row to compare the models on: all are malformed (data.on_bad_row), longer "
            "than data.max_len (data.on_long_row), or without a token that carries loss"
        )
    return [document.ids[:SAMPLE_TOKENS] for document in documents]


@jax.jit
def _log_probabilities(hidden: jax.Array, head: Any, labels: jax.Array) -> jax.Array:
    """log p(label) of [N, D] rows under the head's own full softmax, float32 [N]."""
    logits = head.logits(hidden)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
