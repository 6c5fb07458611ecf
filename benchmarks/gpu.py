"""What a GPU is asked to prove: `make gpu`, or

    python -m benchmarks.gpu                       # every section, the most telling first, about ten minutes
    python -m benchmarks.gpu --sections loss step
    python -m benchmarks.gpu --toy                 # tiny shapes, on a CPU too: does every section run?

Each section runs in a process of its own, so that one that fails, or does not end, takes no other with it, and what is
measured is written at once, to ``benchmarks/results/<machine>.json``.

    loss    the fused loss in bf16 at H = 4,096, V = 128,256, 8,192 tokens, against the matrix products it cannot avoid
    step    the student's training step at the shapes of Qwen3 0.6B, 1.7B and 4B: share of the peak (MFU)
    pool    hidden rows from another process by CUDA IPC: every batch checked, pointers, bandwidth against a plain copy
    sync    a student's weights into an engine of the same GPU: on the device by CUDA IPC, and through the host
    engine  a whole run with SGLang on the same GPU: teacher, transfer, student, waiting
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.record import ROOT, record, spread

RESULTS = ROOT / "benchmarks" / "results"
SECONDS = {"loss": 150, "step": 240, "pool": 90, "sync": 120, "engine": 300}  # then a section is stopped
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the vendor's data sheets
QWEN3 = {
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "1.7B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
}
TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
VOCABULARY = 151_936


def shape(sizes: dict[str, int], toy: bool) -> dict[str, Any]:
    """config.json of a Qwen3 of these sizes."""
    return dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        vocab_size=4096 if toy else VOCABULARY,
        num_key_value_heads=2 if toy else 8,
        head_dim=16 if toy else 128,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **sizes,
    )


def timed(run: Callable[[], Any], repetitions: int = 3, calls: int = 3) -> dict[str, Any]:
    """Seconds of a call: the first one, which compiles, is left out; a repetition is the mean of some in a row."""
    import jax

    jax.block_until_ready(run())
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / calls)
    return spread(seconds)


def loss(toy: bool) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from kdjax.losses import linear_divergence

    rows, width, vocabulary = (256, 64, 4096) if toy else (8192, 4096, 128_256)
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, teacher_hidden = (jax.random.normal(key, (rows, width), jnp.bfloat16) for key in keys[:2])
    head, teacher_head = (jax.random.normal(k, (width, vocabulary), jnp.bfloat16) * width**-0.5 for k in keys[2:])
    mask = jnp.ones(rows, bool)
    flops = 8 * rows * width * vocabulary
    result: dict[str, Any] = {"rows": rows, "width": width, "vocabulary": vocabulary, "dtype": "bfloat16"}

    def product(spec: str) -> Callable:
        return jax.jit(lambda a, b: jnp.einsum(spec, a, b))

    def products() -> dict[str, Any]:
        slope = jnp.zeros((rows, vocabulary), jnp.bfloat16) + jnp.bfloat16(1e-3)
        return {
            "logits": timed(lambda f=product("nd,dv->nv"): f(hidden, head)),
            "hidden gradient": timed(lambda f=product("nv,dv->nd"): f(slope, head)),
            "head gradient": timed(lambda f=product("nd,nv->dv"): f(hidden, slope)),
        }

    each = products()
    floor = 2 * each["logits"]["seconds"] + each["hidden gradient"]["seconds"] + each["head gradient"]["seconds"]
    result["floor"] = {"seconds": floor, "tflops": flops / floor / 1e12, "products": each}
    for divergence in ("kl", "jsd"):
        for chunk in (None,) if toy else (1024, 2048, 4096):

            def run(hidden, head, divergence=divergence, chunk=chunk):
                teacher = teacher_hidden, teacher_head
                return linear_divergence(hidden, head, *teacher, divergence=divergence, mask=mask, chunk_rows=chunk)[0]

            compiled = jax.jit(jax.value_and_grad(run, (0, 1))).lower(hidden, head).compile()
            memory = compiled.memory_analysis()
            measured = timed(lambda compiled=compiled: compiled(hidden, head))
            measured |= {"floor_ratio": measured["seconds"] / floor}
            if memory is not None:
                measured["bytes_above_inputs"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
            result[f"{divergence}, chunks of {chunk or 'the default'}"] = measured
    return result


def step(toy: bool) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kdjax.algorithms import Teacher, make_algorithm
    from kdjax.config import from_dict
    from kdjax.data import Batch
    from kdjax.losses import Head
    from kdjax.models import load_model
    from kdjax.sharding import make_mesh
    from kdjax.training.optimizer import make_optimizer
    from kdjax.training.sources import to_device
    from kdjax.training.step import make_step

    sequence, teacher_width = (128, 96) if toy else (4096, 4096)
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in jax.devices()[0].device_kind), None)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    result: dict[str, Any] = {"sequence": sequence, "peak_flops": peak}
    tries = [("1.7B", 4, "none"), ("1.7B", 8, "dots"), ("4B", 2, "dots"), ("0.6B", 8, "none"), ("4B", 2, "full")]
    for name, batch_size, remat in tries[:1] if toy else tries:
        config = shape(TOY if toy else QWEN3[name], toy)
        attention = "xla" if toy else "cudnn"
        settings = from_dict(
            {
                "student": {"init": "random", "config": config, "dtype": "bfloat16", "attention": attention},
                "data": {"train": [{"path": "none"}], "tokenizer": "none"},
                "distill": {"kd_ratio": 0.5},
            }
        )
        try:
            model = load_model(
                None, mesh=mesh, config=config, init="random", dtype="bfloat16", remat=remat, attention=attention
            )
            weight = jax.random.normal(jax.random.key(1), (config["vocab_size"], teacher_width), jnp.bfloat16) * 0.02
            algorithm = make_algorithm(settings, model, (Teacher(Head(weight, layout="vd"), teacher_width, "random"),))
            train = make_step(model, algorithm, make_optimizer(settings.train, 1000), mesh)
            rows = batch_size * sequence
            host = Batch(
                tokens=np.random.default_rng(0).integers(1, 4000, (1, batch_size, sequence)).astype(np.int32),
                positions=np.broadcast_to(np.arange(sequence, dtype=np.int32), (1, batch_size, sequence)),
                segment_ids=np.ones((1, batch_size, sequence), np.int32),
                rows=np.arange(rows, dtype=np.int32)[None, None],
                labels=np.ones((1, rows), np.int32),
                mask=np.ones((1, rows), bool),
                teacher_hidden=(np.full((1, rows, teacher_width), 0.1, jnp.bfloat16),),
            )
            batch = to_device(host, mesh)
            measured = timed(lambda train=train, batch=batch: train(batch)["loss"])
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            result[f"{name}, {batch_size} rows, remat {remat}"] = {"failed": str(error).splitlines()[0][:300]}
            continue
        count = sum(x.size for x in jax.tree.leaves(train.state["params"]["student"]))
        # 6 a weight and token (the tied head's included), causal attention, and the teacher's logits.
        attention_flops = (
            6 * config["num_hidden_layers"] * sequence * config["num_attention_heads"] * config["head_dim"]
        )
        flops = rows * (6 * count + attention_flops + 2 * teacher_width * config["vocab_size"])
        measured |= {"parameters": count, "tokens_per_second": rows / measured["seconds"], "flops": flops}
        measured["mfu"] = None if peak is None else flops / measured["seconds"] / peak
        stats = jax.devices()[0].memory_stats() or {}
        measured["peak_bytes"] = stats.get("peak_bytes_in_use")
        result[f"{name}, {batch_size} rows, remat {remat}"] = measured
        print(name, batch_size, remat, measured, flush=True)
        del model, algorithm, train, batch
    return result


WRITER = """
import sys, pickle, torch
from bridge.cuda import gpus
from bridge.pool_rows import PoolRows
spec = pickle.loads(bytes.fromhex(sys.argv[1]))
rows = PoolRows(spec, ranks=[gpus()[0] if spec.blocks else ""])
device = "cuda" if spec.blocks else "cpu"
for line in sys.stdin:
    kind, number, row, count = line.split()
    row, count = int(row), int(count)
    if kind == "fill":
        at = torch.arange(row, row + count, device=device, dtype=torch.float32)[:, None]
        value = (at * 31 + int(number) * 17) % 251
        rows.write(row, value.expand(count, spec.width).to(rows.dtype))
        rows.finish()
    else:
        source = torch.ones(count, spec.width, device=device, dtype=rows.dtype)
        rows.write(row, source); rows.finish()
        import time
        start = time.perf_counter()
        for _ in range(10):
            rows.write(row, source)
        rows.finish()
        pool = (time.perf_counter() - start) / 10
        other = torch.empty_like(source)
        start = time.perf_counter()
        for _ in range(10):
            other.copy_(source)
        if spec.blocks:
            torch.cuda.synchronize()
        plain = (time.perf_counter() - start) / 10
        print(source.nbytes, pool, plain, flush=True); continue
    print("done", flush=True)
"""


def pool(toy: bool) -> dict[str, Any]:
    import pickle

    import jax
    import jax.numpy as jnp
    import numpy as np

    from bridge.hidden_pool import HiddenPool

    on_gpu = jax.default_backend() == "gpu"
    rows, width, batches = (2048, 64, 50) if toy else (65_536, 4096, 1000)
    rng = np.random.default_rng(0)
    wrong = pointers = 0
    with HiddenPool.create(rows=rows, width=width, dtype="bfloat16", on=[[0]] if on_gpu else ()) as hidden:
        argument = pickle.dumps(hidden.spec).hex()
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, argument],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

        def ask(*words: object) -> str:
            writer.stdin.write(" ".join(map(str, words)) + "\n")
            return writer.stdout.readline().strip()

        @jax.jit
        def mismatches(array: jax.Array, row: jax.Array, number: jax.Array) -> jax.Array:
            expected = ((row + jnp.arange(len(array))) * 31 + number * 17) % 251
            return (array != expected[:, None].astype(array.dtype)).sum()

        sizes = (64, 256) if toy else (512, 1024, 2048, 4096)
        start = time.perf_counter()
        held: list[Any] = []
        for number in range(batches):
            lease = hidden.lease([int(rng.choice(sizes))], timeout=30)
            assert ask("fill", number, lease.starts[0], lease.counts[0]) == "done"
            view = lease.view(0)
            array = jax.dlpack.from_dlpack(view, copy=False)
            pointers += array.unsafe_buffer_pointer() == view.address
            held.append((lease, mismatches(array, lease.starts[0], number)))
            if len(held) > rng.integers(1, 6):  # several leases are alive while the next is written
                done, count = held.pop(0)
                wrong += int(count)
                done.release()
        for done, count in held:
            wrong += int(count)
            done.release()
        seconds = time.perf_counter() - start
        with hidden.lease([rows // 2], timeout=30) as lease:
            size, into_pool, plain = map(float, ask("speed", 0, lease.starts[0], lease.counts[0]).split())
        writer.stdin.close()
        writer.wait(30)
    return {
        "batches": batches,
        "wrong_numbers": wrong,
        "viewed_in_place": pointers,
        "seconds": seconds,
        "bytes": size,
        "pool_bytes_per_second": 2 * size / into_pool,
        "copy_bytes_per_second": 2 * size / plain,
        "share_of_plain_copy": plain / into_pool,
    }


def sync(toy: bool) -> dict[str, Any]:
    """Weights of one random model into an engine that runs another; its answers must be the sender's afterwards."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bridge.client import start_engine
    from kdjax.models import export_hf, load_model
    from kdjax.rollouts.weights import EngineTensors

    dtype = "float32" if toy else "bfloat16"
    options = dict(config=shape(TOY if toy else QWEN3["1.7B"], toy), init="random", dtype=dtype)
    ids = np.random.default_rng(0).integers(1, 4000, 200).astype(np.int32)
    result: dict[str, Any] = {"dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        start = load_model(None, **options, param_dtype="bfloat16", seed=1)
        export_hf(start, Path(folder) / "start", tokenizer=ROOT / "examples" / "tokenizer", dtype=dtype)
        del start
        student = load_model(None, **options, seed=2)  # float32 masters, as in training
        expected = jax.nn.log_softmax(student.logits(student(jnp.asarray(ids)[None])[0, :-1]))
        expected = np.asarray(jnp.take_along_axis(expected, ids[1:, None], axis=1)[:, 0], np.float32)
        log = Path(folder) / "engine.log"
        with start_engine(Path(folder) / "start", kind="transformers", log=log, dtype=dtype) as engine:
            for way in ("cuda", "cpu") if jax.default_backend() == "gpu" else ("cpu",):
                before = np.abs(engine.score([ids])[0] - expected).mean()
                seconds = []
                for version in range(4):
                    tensors = EngineTensors(student, dtype, engine_device=way)
                    began = time.perf_counter()
                    engine.update_weights(tensors, version=version, gpu=tensors.gpu)
                    seconds.append(time.perf_counter() - began)
                size = sum(x.nbytes for _, x in EngineTensors(student, dtype))
                measured = spread(seconds[1:])  # the first one compiles, and opens the bucket
                measured |= {"bytes": size, "bytes_per_second": size / measured["seconds"], "first": seconds[0]}
                after = np.abs(engine.score([ids])[0] - expected).mean()
                measured |= {"gap_before": float(before), "gap_after": float(after)}
                result["on the device" if tensors.gpu is not None else "through the host"] = measured
    return result


def engine(toy: bool) -> dict[str, Any]:
    from kdjax.models import export_hf, load_model

    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        sizes = TOY if toy else QWEN3["4B"]
        model = load_model(None, config=shape(sizes, toy), init="random", param_dtype="bfloat16", seed=1)
        export_hf(model, teacher, tokenizer=ROOT / "examples" / "tokenizer")
        del model
        student = json.dumps(shape(TOY if toy else QWEN3["0.6B"], toy))
        steps, length, rows = (4, 256, 2) if toy else (30, 2048, 16)
        arguments = {
            "attention_backend": "triton",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "disable_cuda_graph": True,
            "chunked_prefill_size": -1,
            "max_total_tokens": 131072,
            "disable_custom_all_reduce": True,
        }
        overrides = [f"student.config={student}", "student.path=null", f"student.scan_layers={not toy}"]
        overrides += [f"teacher.path={teacher}", f"data.max_len={length}", f"train.batch_size={rows}"]
        overrides += [f"train.steps={steps}", "train.eval_every=null", "train.eval_rows=8", "log.every=5"]
        overrides += ["log.tensorboard=false", "log.sample_prompt=null", "log.samples=0"]
        overrides += ["checkpoint.check_export=false"]
        overrides += ["train.learning_rate=1.0e-4", "train.min_lr=0.0"]
        if not toy:
            overrides += ["teacher.dtype=bfloat16", "teacher.mem_fraction=0.2", f"teacher.args={json.dumps(arguments)}"]
            overrides += ["student.dtype=bfloat16", "student.attention=cudnn", "teacher.threads=null"]
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "kdjax.train", "--config", "configs/quickstart.yaml", f"output={out}"]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run([*command, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True)
        log = out / "engine.log"
        if done.returncode:
            tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
            raise RuntimeError(f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}\n{tail}")
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    windows = [r for r in records if "seconds/step" in r][2 if not toy else 0 :]  # the first ones compile
    names = [name for name in windows[0] if name.startswith("seconds/") or name == "tokens_per_second"]
    result = {name: median(window[name] for window in windows) for name in names}
    return result | {"loss": [r["loss"] for r in records if "loss" in r], "output": done.stdout[-1500:]}


def run_section(name: str, toy: bool, out: Path) -> None:
    out.write_text(json.dumps({"loss": loss, "step": step, "pool": pool, "sync": sync, "engine": engine}[name](toy)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--toy", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, help="where results go (default: benchmarks/results/<machine>.json)")
    parser.add_argument("--section", choices=SECONDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        run_section(arguments.section, arguments.toy, arguments.out)
        return 0
    gpu = _gpu_name()
    if gpu is None and not arguments.toy:
        print("error: no GPU answers here (nvidia-smi); --toy runs the same sections at tiny shapes on a CPU")
        return 2
    out = arguments.out or RESULTS / f"{re.sub('[^a-z0-9]+', '_', (gpu or 'toy').lower()).strip('_')}.json"
    measured: dict[str, Any] = {"gpu": gpu, "toy": arguments.toy}
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    for name in arguments.sections:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            command = [sys.executable, "-m", "benchmarks.gpu", "--section", name, "--out", str(part)]
            start = time.perf_counter()
            try:
                done = subprocess.run(
                    command + ["--toy"] * arguments.toy,
                    cwd=ROOT,
                    env=environment,
                    timeout=SECONDS[name],
                    capture_output=True,
                    text=True,
                )
                failed = None if part.exists() else (done.stdout + done.stderr)[-4000:]
            except subprocess.TimeoutExpired as late:
                failed = f"stopped after {SECONDS[name]} s\n{(late.stdout or b'').decode()[-3000:]}"
            measured[name] = json.loads(part.read_text()) if failed is None else {"failed": failed}
        measured[name]["wall_seconds"] = time.perf_counter() - start
        record(out, measured)
        print(f"== {name}: {json.dumps(measured[name], indent=1)[:3500]}", flush=True)
    return int(any("failed" in measured[name] for name in arguments.sections))


def _gpu_name() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (FileNotFoundError, subprocess.CalledProcessError, IndexError):
        return None


if __name__ == "__main__":
    sys.exit(main())
