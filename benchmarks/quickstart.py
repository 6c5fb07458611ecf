"""What distillation gains over fine-tuning the same student: the README's table, over several seeds.

    python -m benchmarks.quickstart                        # about an hour on two cores
    python -m benchmarks.quickstart --only-table           # write the table anew from the committed results

Each seed trains the quickstart's student four times: with its teacher; by supervised fine-tuning (SFT) for as many
steps; by SFT for as many seconds; and by SFT for ``LONG`` times as many steps, of which the best evaluation counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from benchmarks.record import record

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
RESULT = ROOT / "benchmarks" / "results" / "quickstart.json"
README = ROOT / "README.md"
MARK = "<!-- quickstart table: python -m benchmarks.quickstart -->"
SFT = ("teacher.path=null", "data.tokenizer=examples/teacher")
LONG = 4


def run(name: str, seed: int, steps: int, *overrides: str) -> dict[str, Any]:
    """Train and return the held-out numbers by step and the seconds that training took, evaluation not counted."""
    out = ROOT / "runs" / "benchmark" / f"{name}-{seed}"
    command = [sys.executable, "-m", "kdjax.train", "--config", str(CONFIG), f"output={out}", "overwrite=true"]
    command += [f"train.seed={seed}", f"train.steps={steps}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = {
        r["step"]: {k.removeprefix("eval/"): v for k, v in r.items() if k.startswith("eval/")}
        for r in records
        if "eval/ce" in r
    }
    timed = [r for r in records if "seconds/step" in r]
    every = timed[1]["step"] - timed[0]["step"]
    seconds = mean(r["seconds/step"] for r in timed[1:]) * steps  # the first interval holds the warm-up
    best = min(evaluations, key=lambda step: evaluations[step]["ce"])
    result = dict(
        steps=steps, seconds=seconds, final=evaluations[steps], best_step=best, best=evaluations[best], every=every
    )
    print(
        f"{name} seed {seed}: {steps} steps in {seconds:.0f} s, ce {evaluations[steps]['ce']:.4f}, "
        f"best {evaluations[best]['ce']:.4f} at {best}",
        flush=True,
    )
    return result


def measure(seeds: list[int]) -> dict[str, Any]:
    steps = yaml.safe_load(CONFIG.read_text())["train"]["steps"]
    runs: dict[str, list] = {"kd": [], "sft_steps": [], "sft_seconds": [], "sft_best": []}
    for seed in seeds:
        kd = run("kd", seed, steps)
        same = run("sft_steps", seed, steps, *SFT)
        longer = round(steps * kd["seconds"] / same["seconds"])
        runs["kd"].append(kd)
        runs["sft_steps"].append(same)
        runs["sft_seconds"].append(run("sft_seconds", seed, longer, *SFT))
        runs["sft_best"].append(run("sft_best", seed, LONG * steps, *SFT, f"train.eval_every={steps // 4}"))
    return {"seeds": seeds, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """A Markdown table of means ± standard deviations over the seeds."""
    runs = result["runs"]

    def row(name: str, entries: list[dict], which: str) -> str:
        ce = [e[which]["ce"] for e in entries]
        accuracy = [e[which]["accuracy"] for e in entries]
        spread = f" ± {stdev(ce):.3f}" if len(ce) > 1 else ""
        steps = mean(e["best_step"] if which == "best" else e["steps"] for e in entries)
        seconds = mean(e["seconds"] * (e["best_step"] / e["steps"] if which == "best" else 1) for e in entries)
        return f"| {name} | {steps:.0f} | {seconds:.0f} s | {mean(ce):.3f}{spread} | {100 * mean(accuracy):.1f} % |"

    teacher = runs["kd"][0]["final"]
    machine = result["machine"]
    return "\n".join(
        [
            "| | steps | training | held-out cross-entropy (nats a token) | next token right |",
            "|---|---|---|---|---|",
            f"| teacher, 5.8 M parameters | | | {teacher['teacher_ce']:.3f} | |",
            row("**student, 1.3 M, distilled**", runs["kd"], "final"),
            row("student, SFT, equal steps", runs["sft_steps"], "final"),
            row("student, SFT, equal seconds", runs["sft_seconds"], "final"),
            row(f"student, SFT, its best evaluation in {LONG}× the steps", runs["sft_best"], "best"),
            "",
            f"Mean ± standard deviation over seeds {', '.join(map(str, result['seeds']))}; {machine['cpu']}, "
            f"{machine['cores']} cores.",
        ]
    )


def write_table(result: dict[str, Any]) -> None:
    """Replace what stands between the two marks in the README."""
    before, _, rest = README.read_text().partition(MARK)
    _, _, after = rest.partition(MARK)
    README.write_text(f"{before}{MARK}\n\n{table(result)}\n\n{MARK}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only-table", action="store_true", help="measure nothing, write the README's table")
    arguments = parser.parse_args()
    if not arguments.only_table:
        record(RESULT, measure(arguments.seeds))
    write_table(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
