"""End-to-end off-policy distillation against TRL's GKDTrainer (lmbda 0): the same models, documents and precision.

    python -m benchmarks.trl_gkd            # about twenty minutes on two cores, TRL's set-up (once) not counted

With the quickstart's models, and with some as small at random weights that have Qwen3's vocabulary: of real ones the
heads are a large part of the work. Two comparisons of each. *Agreement*: unpacked, in file order, both take the same
documents a step; the losses must be the same numbers. *Speed*: each in the form its users run, kdjax packed, with
SGLang as the teacher, TRL padded, as GKDTrainer has no packing. TRL gets as many documents a step as hold about the
tokens of a packed step of kdjax, and counted are tokens of documents, not padding. Runs take turns. The share of the
floor is what of a run's time the matrix products that nobody can avoid would take alone, at the speed that one has on
all cores. TRL lives in an environment of its own, under ``runs/benchmark``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.record import ROOT, record, spread
from benchmarks.timing import SECONDS, in_turns, quotient
from kdjax.config import load_config

CONFIG = ROOT / "configs" / "quickstart.yaml"
RESULT = ROOT / "benchmarks" / "results" / "trl_gkd.json"
FOLDER = ROOT / "runs" / "benchmark" / "trl"
PACKAGES = ["trl==1.16.0", "transformers>=5.12,<6", "accelerate", "datasets", "jinja2"]
PRODUCT = 1536  # rows and columns of the matrices that say how fast a product is
REPETITIONS = 3
COMMON = {"learning_rate": 1e-3, "betas": [0.9, 0.95]}


@dataclass(frozen=True)
class Case:
    """rows: of kdjax's packed step. batch: documents a step of the agreement. warm: steps of ``steps`` not counted."""

    rows: int
    steps: int
    warm: int
    batch: int
    agreement_steps: int
    vocabulary: int | None = None
    """random models with so many ids; None: the quickstart's"""

    @property
    def models(self) -> Path:
        return FOLDER / ("quickstart" if self.vocabulary is None else f"vocabulary-{self.vocabulary}")


CASES = {
    "quickstart": Case(rows=4, steps=40, warm=10, batch=8, agreement_steps=10),
    "large vocabulary": Case(rows=2, steps=12, warm=4, batch=4, agreement_steps=4, vocabulary=151_936),
}


def environment() -> Path:
    """TRL's own Python, set up at the first call; a CPU build of torch first, which the rest then keeps."""
    python = FOLDER / "venv" / "bin" / "python"
    if not (FOLDER / "venv" / "ready").exists():
        venv.create(FOLDER / "venv", with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "-r", str(ROOT / "requirements" / "cpu-torch.txt")], check=True)
        subprocess.run([*pip, *PACKAGES], check=True)
        (FOLDER / "venv" / "ready").touch()
    return python


def overrides(case: Case, out: Path, steps: int, **more: Any) -> list[str]:
    values = {
        "output": out,
        "overwrite": "true",
        "student.init": "pretrained",
        "student.path": case.models / "student",
        "student.config": "{}",
        "teacher.path": case.models / "teacher",
        "teacher.dtype": "float32",
        "teacher.batches_per_call": 1,  # one of several rows fills a prefill
        "teacher.lookahead": 1,  # few steps are counted: the teacher should not have done many of them before
        "distill.kd_ratio": 1.0,
        "train.steps": steps,
        "train.batch_size": case.rows,
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


def kdjax(case: Case, name: str, steps: int, **more: Any) -> list[dict[str, Any]]:
    out = case.models / name
    command = [sys.executable, "-m", "kdjax.train", "--config", "configs/quickstart.yaml"]
    subprocess.run([*command, *overrides(case, out, steps, **more)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r]


def trl(case: Case, python: Path, steps: int, batch: int) -> dict[str, Any]:
    job = {"batch": batch, "steps": steps} | {name: str(case.models / name) for name in ("student", "teacher")}
    (case.models / "job.json").write_text(json.dumps(job | COMMON | {"threads": os.cpu_count()}))
    side = Path(__file__).with_name("trl_side.py")
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [str(python), str(side), str(case.models)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=case.models, env=environment)
    return json.loads((case.models / "result.json").read_text())


@dataclass(frozen=True)
class Size:
    """What decides a model's matrix products: parameters of its layers, hidden width, ids in its vocabulary."""

    layers: int
    width: int
    vocabulary: int


def flops(student: Size, teacher: Size, loss_share: float) -> float:
    """Of a document token, in products that have to be: layers forward and, the student's, backward (2 + 4 a weight),
    the teacher's forward (2), and the heads of the share of tokens that carry loss. Attention is left out."""
    layers = 6 * student.layers + 2 * teacher.layers
    heads = 6 * student.width * student.vocabulary + 2 * teacher.width * teacher.vocabulary
    return layers + loss_share * heads


def product_flops(seconds: float = SECONDS) -> float:
    """Floating-point operations a second of a float32 matrix product on all cores."""
    matrix = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT))
    multiply = jax.jit(lambda a: a @ a)
    multiply(matrix).block_until_ready()
    timed = in_turns({"product": lambda: multiply(matrix).block_until_ready()}, rounds=1, seconds=seconds)
    return 2 * PRODUCT**3 / timed["product"]["seconds"]


def prepare(case: Case) -> tuple[list[dict[str, Any]], dict[str, Size]]:
    """The student's initial weights as a folder, the teacher in float32, and the documents in the order of the data."""
    from kdjax.data import DataStream, load_tokenizer
    from kdjax.models import export_hf, load_model

    config = load_config(CONFIG)
    teacher = ROOT / "examples" / "teacher"
    wide = {} if case.vocabulary is None else {"vocab_size": case.vocabulary}
    student = load_model(teacher, init="random", config=dict(config.student.config) | wide, seed=0)
    export_hf(student, case.models / "student", source=teacher, tokenizer=teacher)
    # Random weights as large as these make a teacher that is sure of some ids.
    sure = {"init": "random", "config": wide | {"initializer_range": 0.1}}
    given = load_model(teacher, **(sure if wide else {}))
    export_hf(given, case.models / "teacher", source=teacher, tokenizer=teacher, dtype="float32")
    for name in ("student", "teacher") if wide else ():
        widen(case.models / name / "tokenizer.json", case.vocabulary)
    data = DataStream(
        config.data, load_tokenizer(teacher), batch=case.rows, sources=config.data.train, in_order=True, epochs=1
    )
    placed = [p.document for host in data for p in host.documents]
    placed.sort(key=lambda document: int(document.source.rpartition(":")[2]))  # packed in another order than read
    documents = [{"ids": d.ids.tolist(), "loss": d.loss.tolist()} for d in placed[: 4 * case.steps * case.rows]]
    data.close()
    (case.models / "documents.json").write_text(json.dumps(documents))
    return documents, {"student": size_of(student), "teacher": size_of(given)}


def widen(tokenizer: Path, ids: int) -> None:
    """Give a tokenizer entries that no text has, up to ``ids``: kdjax leaves out of a loss what the tokenizer lacks."""
    given = json.loads(tokenizer.read_text())
    known = [*given["model"]["vocab"].values(), *(token["id"] for token in given["added_tokens"])]
    given["model"]["vocab"] |= {f"<unused {i}>": i for i in range(max(known) + 1, ids)}
    tokenizer.write_text(json.dumps(given, ensure_ascii=False))


def size_of(model: nnx.Module) -> Size:
    config = model.config
    head = config.hidden_size * config.vocab_size * (1 if config.tie_word_embeddings else 2)
    every = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return Size(every - head, config.hidden_size, config.vocab_size)


def measure(case: Case, python: Path) -> dict[str, Any]:
    case.models.mkdir(parents=True, exist_ok=True)
    documents, sizes = prepare(case)
    unpacked = {"data.packing": "false", "data.shuffle": "false", "train.batch_size": case.batch, "log.every": 1}
    ours = [r["kd"] for r in kdjax(case, "agreement", case.agreement_steps, **unpacked)]
    theirs = trl(case, python, case.agreement_steps, case.batch)["losses"]
    gaps = np.abs(np.subtract(ours, theirs)) / np.abs(theirs)
    print(f"losses: kdjax {ours[0]:.5f} … {ours[-1]:.5f}, TRL {theirs[0]:.5f} … {theirs[-1]:.5f}", flush=True)
    lengths = [len(d["ids"]) for d in documents]
    needed = flops(sizes["student"], sizes["teacher"], sum(sum(d["loss"]) for d in documents) / sum(lengths))
    speeds: dict[str, list[float]] = {"kdjax": [], "trl": []}
    shares: dict[str, list[float]] = {"kdjax": [], "trl": []}
    for number in range(REPETITIONS):
        timed = kdjax(case, "speed", case.steps, **{"log.every": case.warm})
        windows = [r for r in timed if "tokens_per_second" in r][1:]
        speeds["kdjax"].append(mean(r["tokens_per_second"] for r in windows))
        tokens = mean(r["tokens_per_second"] * r["seconds/step"] for r in windows)
        batch = round(tokens / mean(lengths))
        result = trl(case, python, case.steps, batch)
        seconds = result["times"][-1] - result["times"][case.warm - 1]
        speeds["trl"].append(sum(lengths[case.warm * batch : case.steps * batch]) / seconds)
        floor = needed / product_flops()
        for name, values in speeds.items():
            shares[name].append(floor * values[-1])
        print(f"{number}: " + ", ".join(f"{k} {v[-1]:.0f} tokens/s" for k, v in speeds.items()), flush=True)
    summary = {name: spread(values) for name, values in speeds.items()}
    for each in summary.values():
        each["tokens_per_second"] = each.pop("seconds")
    config = load_config(CONFIG, overrides(case, FOLDER, case.steps))
    return {
        "trl_version": result["trl"],
        "shapes": {
            "steps": case.steps,
            "not_counted": case.warm,
            "dtype": config.student.dtype,
            "kdjax": {"rows": config.train.batch_size, "length": config.data.max_len, "tokens_a_step": tokens},
            "trl": {"documents": batch, "mean_length": mean(lengths), "longest": max(lengths)},
            "models": {name: asdict(size) for name, size in sizes.items()},
        },
        "floor": {
            "flops_a_token": needed,
            "share": {name: median(each) for name, each in shares.items()},
            "each": shares,
        },
        "losses": {"kdjax": ours, "trl": theirs, "largest_relative_gap": float(gaps.max())},
        "speed": summary,
        "ratio": quotient(speeds["kdjax"], speeds["trl"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    python = environment()
    found = record(given.out, {name: measure(CASES[name], python) for name in given.cases})
    for name in given.cases:
        gap = found[name]["losses"]["largest_relative_gap"]
        print(f"{name}: kdjax / TRL: {found[name]['ratio']['ratio']:.2f}; losses differ by {gap:.1e}")


if __name__ == "__main__":
    main()
