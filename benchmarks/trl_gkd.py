"""End-to-end off-policy distillation against TRL's GKDTrainer (lmbda 0): the same models, documents and precision.

    python -m benchmarks.trl_gkd            # about ten minutes on two cores, TRL's set-up (once) not counted

Two comparisons. *Agreement*: unpacked, in file order, both take the same documents a step; the losses must be the same
numbers. *Speed*: each in the form its users run, kdjax packed with SGLang as the teacher, TRL padded, as GKDTrainer has
no packing; counted are tokens of documents, not padding. Runs take turns. TRL lives in an environment of its own, under
``runs/benchmark``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.record import ROOT, record, spread

RESULT = ROOT / "benchmarks" / "results" / "trl_gkd.json"
FOLDER = ROOT / "runs" / "benchmark" / "trl"
PACKAGES = ["trl==1.16.0", "transformers>=5.12,<6", "accelerate", "datasets", "jinja2"]
BATCH, AGREEMENT_STEPS = 8, 10
STEPS, WARM, REPETITIONS = 40, 10, 3
COMMON = {"learning_rate": 1e-3, "betas": [0.9, 0.95]}


def environment() -> Path:
    """TRL's own Python, set up at the first call; a CPU build of torch first, which the rest then keeps."""
    python = FOLDER / "venv" / "bin" / "python"
    if not (FOLDER / "venv" / "ready").exists():
        venv.create(FOLDER / "venv", with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(ROOT / "requirements" / "cpu-torch.txt")], check=True)
        subprocess.run([*pip, *PACKAGES], check=True)
        (FOLDER / "venv" / "ready").touch()
    return python


def overrides(out: Path, steps: int, **more: Any) -> list[str]:
    values = {
        "output": out,
        "overwrite": "true",
        "student.init": "pretrained",
        "student.path": FOLDER / "student",
        "student.config": "{}",
        "teacher.dtype": "float32",
        "distill.kd_ratio": 1.0,
        "train.steps": steps,
        "train.learning_rate": COMMON["learning_rate"],
        "train.betas": COMMON["betas"],
        "train.schedule": "constant",
        "train.warmup_ratio": 0.0,
        "train.min_lr": 0.0,
        "train.weight_decay": 0.0,
        "train.eval_every": "null",
        "train.eval_rows": 4,
        "checkpoint.check_export": "false",
        "log.samples": 0,
        "log.tensorboard": "false",
    } | more
    return [f"{key}={value}" for key, value in values.items()]


def kdjax(name: str, steps: int, **more: Any) -> list[dict[str, Any]]:
    out = FOLDER / name
    command = [sys.executable, "-m", "kdjax.train", "--config", "configs/quickstart.yaml"]
    subprocess.run([*command, *overrides(out, steps, **more)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r]


def trl(python: Path, steps: int) -> dict[str, Any]:
    job = {"student": str(FOLDER / "student"), "teacher": str(FOLDER / "teacher"), "batch": BATCH, "steps": steps}
    (FOLDER / "job.json").write_text(json.dumps(job | COMMON | {"threads": os.cpu_count()}))
    side = Path(__file__).with_name("trl_side.py")
    subprocess.run([str(python), str(side), str(FOLDER)], check=True, stdout=subprocess.DEVNULL, cwd=FOLDER)
    return json.loads((FOLDER / "result.json").read_text())


def prepare() -> list[dict[str, Any]]:
    """The student's initial weights as a folder, the teacher in float32, and the documents in the order of the data."""
    from kdjax.config import load_config
    from kdjax.data import DataStream, load_tokenizer
    from kdjax.models import export_hf, load_model

    config = load_config(ROOT / "configs" / "quickstart.yaml")
    teacher = ROOT / "examples" / "teacher"
    student = load_model(teacher, init="random", config=dict(config.student.config), seed=0)
    export_hf(student, FOLDER / "student", source=teacher, tokenizer=teacher)
    export_hf(load_model(teacher), FOLDER / "teacher", source=teacher, tokenizer=teacher, dtype="float32")
    data = DataStream(
        config.data, load_tokenizer(teacher), batch=BATCH, sources=config.data.train, in_order=True, epochs=1
    )
    placed = [p.document for host in data for p in host.documents]
    placed.sort(key=lambda document: int(document.source.rpartition(":")[2]))  # packed in another order than read
    documents = [{"ids": d.ids.tolist(), "loss": d.loss.tolist()} for d in placed[: 2 * STEPS * BATCH]]
    data.close()
    (FOLDER / "documents.json").write_text(json.dumps(documents))
    return documents


def measure() -> dict[str, Any]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    python = environment()
    documents = prepare()
    unpacked = {"data.packing": "false", "data.shuffle": "false", "train.batch_size": BATCH, "log.every": 1}
    ours = [r["kd"] for r in kdjax("agreement", AGREEMENT_STEPS, **unpacked)]
    theirs = trl(python, AGREEMENT_STEPS)["losses"]
    gaps = np.abs(np.subtract(ours, theirs)) / np.abs(theirs)
    print(f"losses: kdjax {ours[0]:.5f} … {ours[-1]:.5f}, TRL {theirs[0]:.5f} … {theirs[-1]:.5f}", flush=True)
    lengths = [len(d["ids"]) for d in documents]
    speeds: dict[str, list[float]] = {"kdjax": [], "trl": []}
    for number in range(REPETITIONS):
        windows = [r for r in kdjax("speed", STEPS, **{"log.every": WARM}) if "tokens_per_second" in r]
        speeds["kdjax"].append(mean(r["tokens_per_second"] for r in windows[1:]))
        result = trl(python, STEPS)
        seconds = result["times"][-1] - result["times"][WARM - 1]
        speeds["trl"].append(sum(lengths[WARM * BATCH : STEPS * BATCH]) / seconds)
        print(f"{number}: " + ", ".join(f"{k} {v[-1]:.0f} tokens/s" for k, v in speeds.items()), flush=True)
    summary = {name: spread(values) for name, values in speeds.items()}
    for each in summary.values():
        each["tokens_per_second"] = each.pop("seconds")
    return {
        "trl_version": result["trl"],
        "losses": {"kdjax": ours, "trl": theirs, "largest_relative_gap": float(gaps.max())},
        "speed": summary,
        "ratio": summary["kdjax"]["tokens_per_second"] / summary["trl"]["tokens_per_second"],
    }


def main() -> None:
    result = record(RESULT, measure())
    print(f"kdjax / TRL: {result['ratio']:.2f}; losses differ by {result['losses']['largest_relative_gap']:.1e}")


if __name__ == "__main__":
    main()
