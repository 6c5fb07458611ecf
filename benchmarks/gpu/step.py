"""The student's training step at Qwen3's 0.6B, 1.7B and 4B, with and without remat: share of the chip's peak (MFU).

Float32 masters and moments, bfloat16 compute, rows of 4,096 tokens that are one document each, as every recipe has it.
A case has a process of its own, so what another has left behind, or failed for, is none of its memory. The case
``attention`` holds cuDNN's kernel, which all others run with, against XLA's; ``unrolled`` compiles every layer apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu.shapes import shape
from benchmarks.timing import in_turns
from kdjax.algorithms import Teacher, make_algorithm
from kdjax.config import from_dict
from kdjax.data import Batch
from kdjax.losses import Head
from kdjax.models import load_model
from kdjax.sharding import make_mesh
from kdjax.training.optimizer import make_optimizer
from kdjax.training.sources import to_device
from kdjax.training.step import Step, make_step
from kdjax.training.student import make_student

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the vendor's data sheets
SECONDS = 1.5  # of steps in a round
LOSS_AGREES, ROWS_AGREE = 2e-3, 5e-2  # relative: of a mean over tokens, and of the hidden rows in norm
OF_USUAL = 1.5  # times the distance of XLA's own hidden rows in bfloat16 from those in float32


def measure(case: str, toy: bool, folder: Path) -> dict[str, Any]:
    if case == "attention":
        return kernels(toy)
    size, count, remat, *rest = case.split(", ")
    rows, remat = int(count.removesuffix(" rows")), remat.removeprefix("remat ")
    length, teacher_width = (128, 96) if toy else (4096, 4096)
    step = make(size, remat, toy, teacher_width, scan="unrolled" not in rest)
    batch = to_device(full_batch(rows, length, teacher_width), step.mesh)

    def run() -> None:
        jax.block_until_ready(step(batch)["loss"])

    run()  # compiles
    run()
    timed = in_turns({"step": run}, seconds=0.0 if toy else SECONDS)["step"]

    config = shape(size, toy)
    parameters = sum(x.size for x in jax.tree.leaves(step.state["params"]["student"]))
    # 6 a weight and token (the tied head's included), causal attention forward and backward, and the teacher's logits.
    attention = 6 * config["num_hidden_layers"] * length * config["num_attention_heads"] * config["head_dim"]
    flops = rows * length * (6 * parameters + attention + 2 * teacher_width * config["vocab_size"])
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in jax.devices()[0].device_kind), None)
    return timed | {
        "shapes": {"rows": rows, "length": length, "teacher_width": teacher_width, "loss_rows": rows * length},
        "parameters": parameters,
        "tokens_per_second": rows * length / timed["seconds"],
        "flops": flops,
        "peak_flops": peak,
        "mfu": None if peak is None else flops / timed["seconds"] / peak,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def kernels(toy: bool) -> dict[str, Any]:
    """One row through both kernels, in bfloat16: how far the losses are apart, and each's hidden rows from float32's.

    Raises ArithmeticError where that is more than rounding. Weights are larger than a new model's, so that what a row
    attends to decides its loss. Without a GPU there is one kernel, and nothing to compare it with.
    """
    length, shapes = (128 if toy else 1024), shape("0.6B", toy) | {"initializer_range": 0.1}
    tokens = np.random.default_rng(0).integers(1, 4000, (1, length)).astype(np.int32)

    @nnx.jit
    def run(model: nnx.Module) -> tuple[jax.Array, jax.Array]:
        hidden = model(tokens)
        logs = jax.nn.log_softmax(model.logits(hidden[:, :-1]))
        return hidden.astype(jnp.float32), -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1).mean()

    def through(kernel: str, dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array]:
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            weights = dict(config=shapes, init="random", param_dtype="float32")  # the same for all
            return run(load_model(None, **weights, dtype=dtype, attention=kernel))

    (ours, loss), (theirs, expected), (exact, _) = (
        through("xla" if toy else "cudnn"),
        through("xla"),
        through("xla", "float32"),
    )
    of_loss = float(abs(loss - expected) / expected)
    of_rows = float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))
    error, usual = (float(jnp.linalg.norm(rows - exact) / jnp.linalg.norm(exact)) for rows in (ours, theirs))
    if not (of_loss <= LOSS_AGREES and of_rows <= ROWS_AGREE and error <= OF_USUAL * usual):
        raise ArithmeticError(
            f"attention by cuDNN is not XLA's: loss {loss} and {expected}, rows {of_rows:.1e} apart, "
            f"{error:.1e} from float32's where XLA's are {usual:.1e}"
        )
    return {
        "length": length,
        "loss": float(loss),
        "relative_gap": of_loss,
        "relative_gap_of_rows": of_rows,
        "rows_from_float32": [error, usual],
    }


def make(
    size: str, remat: str, toy: bool, teacher_width: int, offload: tuple[str, ...] = (), scan: bool = True
) -> Step:
    """The step of a run with a teacher of this width, on one device, as ``kdjax.train`` builds it."""
    config = shape(size, toy)
    student = {"init": "random", "config": config, "dtype": "bfloat16", "param_dtype": "float32", "remat": remat}
    settings = from_dict(
        {
            "student": student | {"attention": "xla" if toy else "cudnn", "scan_layers": scan},
            "data": {"train": [{"path": "none"}], "tokenizer": "none", "packing": False},
            "distill": {"kd_ratio": 0.5},
        }
    )
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = make_student(settings, mesh)
    weight = jax.random.normal(jax.random.key(1), (config["vocab_size"], teacher_width), jnp.bfloat16) * 0.02
    algorithm = make_algorithm(settings, model, (Teacher(Head(weight, layout="vd"), teacher_width, "random"),))
    return make_step(model, algorithm, make_optimizer(settings.train, 1000), mesh, offload)


def full_batch(rows: int, length: int, teacher_width: int) -> Batch:
    """A document a row, without padding or segments; every token carries loss."""
    count, drawn = rows * length, np.random.default_rng(0)
    return Batch(
        tokens=drawn.integers(1, 4000, (1, rows, length)).astype(np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (1, rows, length)),
        segment_ids=None,
        rows=np.arange(count, dtype=np.int32)[None, None],
        labels=np.ones((1, count), np.int32),
        mask=np.ones((1, count), bool),
        teacher_hidden=(drawn.standard_normal((1, count, teacher_width), np.float32).astype(jnp.bfloat16),),
    )
