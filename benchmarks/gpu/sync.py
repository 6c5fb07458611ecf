"""A student's weights into an engine of the same GPU: on the device by CUDA IPC, and through the host.

The engine runs other weights at first; afterwards its log-probabilities must be the sender's, or this fails.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.shapes import shape
from benchmarks.record import ROOT, spread
from benchmarks.timing import ROUNDS
from bridge.client import RemoteEngine, start_engine
from kdjax.models import Decoder, export_hf, load_model
from kdjax.models.weights import hf_tensors
from kdjax.rollouts.weights import EngineTensors

AGREE = 0.05  # mean difference of log-probabilities, in nats: two implementations, in bfloat16


def measure(case: None, toy: bool, folder: Path) -> dict[str, Any]:
    dtype = "float32" if toy else "bfloat16"
    options = dict(config=shape("1.7B", toy), init="random", dtype=dtype)
    result: dict[str, Any] = {"dtype": dtype, "model": "1.7B"}
    start = load_model(None, **options, param_dtype="bfloat16", seed=1)
    export_hf(start, folder / "sync", tokenizer=ROOT / "examples" / "tokenizer", dtype=dtype)
    del start
    with start_engine(folder / "sync", kind="transformers", log=folder / "sync.log", dtype=dtype) as engine:
        for number, device in enumerate(("cuda", "cpu") if jax.default_backend() == "gpu" else ("cpu",)):
            student = load_model(None, **options, param_dtype="float32", seed=2 + number)  # masters, as in training
            way = "through the host" if EngineTensors(student, engine_device=device).gpu is None else "on the device"
            result[way] = sent(student, engine, dtype, device)
    return result


def sent(student: Decoder, engine: RemoteEngine, dtype: str, device: str) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(1, 4000, 200).astype(np.int32)
    logs = jax.nn.log_softmax(student.logits(student(jnp.asarray(ids)[None])[0, :-1]))
    expected = np.asarray(jnp.take_along_axis(logs, ids[1:, None], axis=1)[:, 0], np.float32)
    size = sum(x.nbytes for _, x in hf_tensors(student, dtype))
    before = np.abs(engine.score([ids])[0] - expected).mean()
    seconds = []
    for version in range(ROUNDS + 1):
        tensors = EngineTensors(student, dtype, engine_device=device)
        began = time.perf_counter()
        engine.update_weights(tensors, version=version, gpu=tensors.gpu)
        seconds.append(time.perf_counter() - began)
    measured = spread(seconds[1:])  # the first one compiles, and opens the bucket
    measured |= {"bytes": size, "bytes_per_second": size / measured["seconds"], "first": seconds[0]}
    after = np.abs(engine.score([ids])[0] - expected).mean()
    if not after < AGREE:
        raise RuntimeError(f"the engine does not run the weights that were sent: gap {after}, and {before} before")
    return measured | {"gap_before": float(before), "gap_after": float(after)}
