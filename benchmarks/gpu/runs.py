"""Whole runs with SGLang on the same GPU, at Qwen3's shapes with random weights, and what their metrics say.

teacher      its folder is written, for all that follow
off-policy   the teacher beside the student, overlapped or in turns with it: prefill, transfer, step
on-policy    the student writes, learns, and its weights go to its engine
colocated    teacher and trainer hold the GPU in turn: the engine sleeps while the student trains, and AdamW's moments
             wait in host memory
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import shape
from benchmarks.record import ROOT, spread
from bridge.checkpoint import read_facts
from kdjax.models import export_hf, load_model
from kdjax.training.metrics import read_metrics

TEACHER, STUDENT = "4B", "0.6B"
# What SGLang needs when only the kernels that Triton compiles are installed.
SGLANG = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_custom_all_reduce": True,
}
NAMES = ("step", "teacher", "waiting", "transfer", "student", "sync", "generate")


def measure(case: str, toy: bool, folder: Path) -> dict[str, Any]:
    teacher = teacher_folder(folder, toy)
    if case == "teacher":
        return {"bytes": sum(file.stat().st_size for file in teacher.glob("*.safetensors"))}
    out = folder / case.replace(", ", "-").replace(" ", "-")
    values, shapes, skip = CASES[case](teacher, toy)
    found = run(out, values, skip) | {"shapes": shapes | {"teacher": TEACHER, "student": STUDENT}}
    shutil.rmtree(out / "checkpoints")  # gigabytes
    if case != "on-policy":
        return found
    size = sum(file.stat().st_size for file in (out / "student").glob("*.safetensors"))
    found |= {"weights_bytes": size, "dtype": read_facts(out / "student").dtype}
    return found | {"sync_bytes_per_second": size / found["sync"]["seconds"]}


Case = tuple[dict[str, Any], dict[str, Any], int]
"""What a run changes in the quickstart's configuration, its shapes, and how many of its first windows do not count."""


def overlapped(teacher: Path, toy: bool) -> Case:
    return given_answers(teacher, toy, 4, 1, 1) if toy else given_answers(teacher, toy, 25, 5, 2)


def in_turns(teacher: Path, toy: bool) -> Case:
    values, shapes, skip = overlapped(teacher, toy)
    return values | {"teacher.lookahead": 0}, shapes, skip


def colocated(teacher: Path, toy: bool) -> Case:
    values, shapes, skip = given_answers(teacher, toy, *((3, 1, 1) if toy else (8, 2, 1)))
    return values | {"colocate": True, "train.offload": ["optimizer"]}, shapes, skip


def given_answers(teacher: Path, toy: bool, steps: int, every: int, skip: int) -> Case:
    length, rows = 256, 4 if toy else 128
    values = common(teacher, toy, steps, every) | {
        "data.max_len": length,
        "data.packing": False,  # most documents fill half a row, and cuDNN's attention needs no mask
        "train.batch_size": rows,
    }
    return values, {"steps": steps, "rows": rows, "length": length}, skip


def on_policy(teacher: Path, toy: bool) -> Case:
    steps, every, length, rows = (3, 1, 256, 4) if toy else (8, 1, 512, 32)
    values = common(teacher, toy, steps, every) | {
        "data.max_len": length,
        "data.packing": False,
        "train.batch_size": rows,
        "distill.on_policy_fraction": 1.0,
        "distill.kd_ratio": 1.0,
        "distill.loss": "rkl",
        "rollout.max_new_tokens": 8 if toy else 128,
        "rollout.max_k3": None,  # random weights in bf16: it is written down, and what is measured is time
        "rollout.engine": "transformers" if toy else "sglang",
    }
    if not toy:
        values |= {"rollout.mem_fraction": 0.15, "rollout.threads": None, "rollout.args": SGLANG}
    return values, {"steps": steps, "rows": rows, "length": length}, 1


CASES = {
    "off-policy, overlapped": overlapped,
    "off-policy, in turns": in_turns,
    "on-policy": on_policy,
    "colocated": colocated,
}


def teacher_folder(folder: Path, toy: bool) -> Path:
    """Random weights of the teacher's shape, written by the first section that needs them.

    By a process of its own, as JAX's allocator keeps what it took of the GPU until its process ends.
    """
    out = folder / "teacher"
    if not out.exists():
        write = f"from benchmarks.gpu.runs import write_teacher; write_teacher({str(out)!r}, {toy})"
        subprocess.run([sys.executable, "-c", write], cwd=ROOT, check=True)
    return out


def write_teacher(out: str, toy: bool) -> None:
    config = shape(TEACHER, toy)
    model = load_model(None, config=config, init="random", param_dtype="bfloat16", seed=1)
    export_hf(model, out, tokenizer=ROOT / "examples" / "tokenizer")
    fill_vocabulary(Path(out) / "tokenizer.json", config["vocab_size"])


def fill_vocabulary(tokenizer: Path, size: int) -> None:
    """Give the tokenizer as many ids as the head has: what lacks one is forbidden to the engine, id by id, and
    SGLang 0.5.17 writes each into the GPU's memory by itself, for every prompt."""
    described = json.loads(tokenizer.read_text())
    known = described["model"]["vocab"]
    taken = {*known.values(), *(token["id"] for token in described["added_tokens"])}
    known |= {f"<unused {number}>": number for number in range(size) if number not in taken}
    tokenizer.write_text(json.dumps(described))


def common(teacher: Path, toy: bool, steps: int, every: int) -> dict[str, Any]:
    """What both kinds of run change in the quickstart's configuration."""
    values = {
        "student.path": None,
        "student.config": shape(STUDENT, toy),
        "student.scan_layers": True,
        "teacher.path": str(teacher),
        "train.steps": steps,
        "train.eval_every": None,
        "train.eval_rows": 8,
        "train.learning_rate": 1e-4,
        "train.min_lr": 0.0,
        "log.every": every,
        "log.tensorboard": False,
        "log.sample_prompt": None,
        "log.samples": 0,
        "log.report": False,
        "checkpoint.check_export": False,
    }
    if toy:
        return values | {"teacher.engine": "transformers", "teacher.dtype": "float32"}
    return values | {
        "student.dtype": "bfloat16",
        "student.attention": "cudnn",
        "student.remat": "dots",  # a step of 32,768 tokens fits beside the teacher on a GPU of 80 GB too
        "teacher.dtype": "bfloat16",
        "teacher.batches_per_call": 1,
        "teacher.lookahead": 1,
        "teacher.threads": None,
        "teacher.mem_fraction": 0.2,
        "teacher.args": SGLANG | {"chunked_prefill_size": -1, "max_total_tokens": 131072},
    }


def run(out: Path, values: dict[str, Any], skip: int) -> dict[str, Any]:
    """Train; of what lies in the metrics' windows behind the first ``skip``: median, every window, spread.

    Raises RuntimeError with the end of what the run and its engines printed.
    """
    command = [sys.executable, "-m", "kdjax.train", "--config", "configs/quickstart.yaml", f"output={out}"]
    command += [f"{key}={json.dumps(value)}" for key, value in values.items()]
    screen = out.with_suffix(".log")
    with screen.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file)
    if done.returncode:
        logs = [screen, *out.glob("*.log")]
        raise RuntimeError("\n".join(f"{log.name}: {log.read_text(errors='replace')[-2500:]}" for log in logs))
    windows = [r for r in read_metrics(out / "metrics.jsonl") if "tokens_per_second" in r][skip:]
    found = {name: spread([w[f"seconds/{name}"] for w in windows]) for name in NAMES if f"seconds/{name}" in windows[0]}
    speeds = spread([w["tokens_per_second"] for w in windows])
    speeds["median"] = speeds.pop("seconds")
    found |= {"tokens_per_second": speeds, "losses": [w["loss"] for w in windows]}
    return found | ({"k3": [w["rollout/k3"] for w in windows]} if "rollout/k3" in windows[0] else {})
