"""What the step tests share: tiny models, random ragged batches with teacher rows, and a step over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.algorithms import Teacher, make_algorithm
from kdjax.config import from_dict
from kdjax.data import Batch, Document, HostBatch, collate
from kdjax.losses import Head
from kdjax.models import load_model
from kdjax.sharding import make_mesh
from kdjax.training.optimizer import make_optimizer
from kdjax.training.sources import to_device
from kdjax.training.step import Step, make_step

V, D, E, S, ROWS = 96, 32, 24, 32, 8
SHAPE = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=V, hidden_size=D, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=4, hidden_act="silu",
    rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=64, tie_word_embeddings=True,
    initializer_range=0.2,
)  # fmt: skip


def config(**groups):
    values = {"student": {"init": "random", "config": SHAPE}}
    values["data"] = {"train": [{"path": "none.jsonl"}], "tokenizer": "none"}
    values["train"] = {"learning_rate": 1e-2, "warmup_ratio": 0.0, "weight_decay": 0.1}
    for name, entries in groups.items():
        values[name] = values.get(name, {}) | entries
    return from_dict(values)


def documents(seed: int, count: int = 14) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = int(rng.integers(4, 17))
        loss = rng.random(length) < rng.uniform(0.1, 0.9)  # ragged: some documents carry far more loss than others
        loss[0], loss[-1] = False, True
        made.append(Document(rng.integers(0, V, length).astype(np.int32), loss, f"made:{i}"))
    return made


def host_batch(seed: int, accumulate: int = 1, shards: int = 1) -> Batch:
    """A global batch of ROWS packed rows as numpy, teacher rows included; the same documents however it is cut."""
    return host(seed, accumulate, shards).batch


def host(seed: int, accumulate: int = 1, shards: int = 1, loud: Sequence[int] = ()) -> HostBatch:
    """The same with its documents; teacher rows of those in ``loud`` are a hundred times as large."""
    made = documents(seed)
    rows = [made[i : i + 2] for i in range(0, len(made), 2)]
    host = collate(rows, batch=ROWS // accumulate, seq_len=S, accumulate=accumulate, shards=shards)
    batch = host.batch
    states = {d.source: np.random.default_rng([seed, i]).normal(size=(len(d), E)) for i, d in enumerate(made)}
    _, groups, size = batch.rows.shape
    hidden = np.zeros((accumulate, groups, size, E), np.float32)
    for p in host.documents:
        rows_of = p.document.loss_rows
        scale = 100 if p.document.source in {made[i].source for i in loud} else 1
        hidden[p.micro, p.shard, p.offset : p.offset + len(rows_of)] = scale * states[p.document.source][rows_of]
    return replace(host, batch=replace(batch, teacher_hidden=(hidden.reshape(accumulate, groups * size, E),)))


def teacher() -> Teacher:
    weight = np.random.default_rng(7).normal(size=(V, E)).astype(np.float32) * 0.5
    return Teacher(Head(jnp.asarray(weight), layout="vd"), E, "made")


def make(mesh_sizes=(1, 1, 1), devices: int = 1, **groups) -> Step:
    settings = config(**groups)
    mesh = make_mesh(*mesh_sizes, devices=jax.devices()[:devices])
    student = settings.student
    model = load_model(
        None,
        mesh=mesh,
        config=dict(student.config),
        init="random",
        seed=settings.train.seed,
        dtype=student.dtype,
        param_dtype=student.param_dtype,
        remat=student.remat,
    )
    algorithm = make_algorithm(settings, model, (teacher(),), seed=0)
    return make_step(model, algorithm, make_optimizer(settings.train, 60), mesh)


def run(step: Step, steps: int, accumulate: int = 1) -> list[dict[str, float]]:
    """Metrics of ``steps`` steps over batches 0, 1, …"""
    shards = step.mesh.shape["data"] * step.mesh.shape["fsdp"]
    out = []
    for seed in range(steps):
        metrics = step(to_device(host_batch(seed, accumulate, shards), step.mesh))
        out.append({name: float(value) for name, value in metrics.items()})
    return out


def parameters(step: Step) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(step.state["params"])
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in flat}


def close(a, b, tolerance):
    """‖a − b‖ ≤ tolerance · ‖a‖ for every parameter. Not entry by entry: where a gradient is nearly zero, Adam makes a
    whole step of the sign of its last bit."""
    for name in a:
        assert np.linalg.norm(a[name] - b[name]) <= tolerance * np.linalg.norm(a[name]), name
