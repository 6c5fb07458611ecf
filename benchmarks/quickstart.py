"""What distillation gains over fine-tuning the same student: the README's table, over several seeds.

    python -m benchmarks.quickstart                        # an hour and a half on two cores
    python -m benchmarks.quickstart --only-table           # write the table anew from the committed results

First the seconds of a step are measured, with and without a teacher in turn; the fastest few steps of each count, as
others on the machine can only slow them down. Then each seed trains the quickstart's student with its teacher and by
supervised fine-tuning (SFT): for as many steps, for as many seconds, and both for ``LONG`` times the steps, where of
SFT the best evaluation counts and of distillation the last. Stopped, it goes on where it was, and a run whose
configuration has changed since is made anew; ``--fresh`` starts anew with all.
"""

from __future__ import annotations

import argparse
import json
import shutil
from statistics import mean, stdev
from typing import Any

import yaml

from benchmarks.record import ROOT, record, write_between
from benchmarks.runs import made_at, trained

CONFIG = ROOT / "configs" / "quickstart.yaml"
RUNS = ROOT / "runs" / "benchmark" / "quickstart"
RESULT = ROOT / "benchmarks" / "results" / "quickstart.json"
PAGE = ROOT / "README.md"
MARK = "<!-- quickstart table: python -m benchmarks.quickstart -->"
SFT = ("teacher.path=null", "data.tokenizer=examples/teacher")
LONG = 2
TIMED_STEPS, TIMED_RUNS, WINDOW = 200, 3, 20


def overrides(seed: int, steps: int, *more: str) -> list[str]:
    """What a run changes in the quickstart's configuration."""
    quick = ["checkpoint.check_export=false", "log.samples=0", "log.report=false"]
    return [f"train.seed={seed}", f"train.steps={steps}", *quick, *more]


def run(name: str, seed: int, steps: int, *more: str) -> list[dict[str, Any]]:
    """The metrics of one run of the quickstart's configuration."""
    return trained(RUNS / f"{name}-{seed}", CONFIG, *overrides(seed, steps, *more))


def step_seconds() -> dict[str, list[float]]:
    """Seconds of a step in every few steps of some short runs; distillation and SFT take turns."""
    seconds: dict[str, list[float]] = {"kd": [], "sft": []}
    short = ("train.eval_every=null", "train.eval_rows=4", f"log.every={WINDOW}")
    for turn in range(TIMED_RUNS):
        for name, more in (("kd", ()), ("sft", SFT)):
            records = run(f"timed-{name}", turn, TIMED_STEPS, *short, *more)
            timed = [r["seconds/step"] for r in records if "seconds/step" in r]
            seconds[name] += timed[1:]  # the first steps hold the warm-up
            print(f"{name}: {min(seconds[name]):.3f} s a step", flush=True)
    return seconds


def held_out(name: str, seed: int, steps: int, *overrides: str) -> dict[str, Any]:
    """The last and the best held-out numbers of a run."""
    evaluations = {
        r["step"]: {k.removeprefix("eval/"): v for k, v in r.items() if k.startswith("eval/")}
        for r in run(name, seed, steps, *overrides)
        if "eval/ce" in r
    }
    best = min(evaluations, key=lambda step: evaluations[step]["ce"])
    print(
        f"{name} seed {seed}: ce {evaluations[steps]['ce']:.4f} after {steps} steps, "
        f"best {evaluations[best]['ce']:.4f} at {best}",
        flush=True,
    )
    return dict(steps=steps, final=evaluations[steps], best_step=best, best=evaluations[best])


def measure(seeds: list[int]) -> dict[str, Any]:
    steps = yaml.safe_load(CONFIG.read_text())["train"]["steps"]
    timed = step_seconds()
    longer = round(steps * min(timed["kd"]) / min(timed["sft"]))
    runs: dict[str, list] = {"kd": [], "sft_steps": [], "sft_seconds": [], "kd_long": [], "sft_long": []}
    for seed in seeds:
        runs["kd"].append(held_out("kd", seed, steps))
        runs["sft_steps"].append(held_out("sft_steps", seed, steps, *SFT))
        runs["sft_seconds"].append(held_out("sft_seconds", seed, longer, *SFT))
    for seed in seeds:
        runs["kd_long"].append(held_out("kd_long", seed, LONG * steps))
        runs["sft_long"].append(held_out("sft_long", seed, LONG * steps, *SFT))
    return {"commit": made_at(RUNS.iterdir()), "seeds": seeds, "step_seconds": timed, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """A Markdown table of means ± standard deviations over the seeds."""
    runs = result["runs"]
    step = {name: min(each) for name, each in result["step_seconds"].items()}

    def row(title: str, name: str, which: str = "final") -> str:
        entries = runs[name]
        ce = [e[which]["ce"] for e in entries]
        accuracy = [e[which]["accuracy"] for e in entries]
        spread = f" ± {stdev(ce):.3f}" if len(ce) > 1 else ""
        steps = mean(e["best_step"] if which == "best" else e["steps"] for e in entries)
        seconds = steps * step[name.partition("_")[0]]
        return f"| {title} | {steps:.0f} | {seconds:.0f} s | {mean(ce):.3f}{spread} | {100 * mean(accuracy):.1f} % |"

    teacher = runs["kd"][0]["final"]
    machine = result["machine"]
    return "\n".join(
        [
            "| | steps | training | held-out cross-entropy (nats a token) | next token right |",
            "|---|---|---|---|---|",
            f"| teacher, 5.8 M parameters | | | {teacher['teacher_ce']:.3f} | |",
            row("**student, 1.3 M, distilled**", "kd"),
            row("student, SFT, equal steps", "sft_steps"),
            row("student, SFT, equal seconds", "sft_seconds"),
            row(f"**student, distilled, {LONG}× the steps**", "kd_long"),
            row(f"student, SFT, its best evaluation in {LONG}× the steps", "sft_long", "best"),
            "",
            f"Mean ± standard deviation over seeds {', '.join(map(str, result['seeds']))}; training: steps × seconds "
            f"of a step in the fastest {WINDOW} of {TIMED_RUNS} runs that took turns; {machine['cpu']}, "
            f"{machine['cores']} cores. Every number: [benchmarks/results/quickstart.json]"
            "(benchmarks/results/quickstart.json).",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only-table", action="store_true", help="measure nothing, write the README's table")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier call has left")
    arguments = parser.parse_args()
    if arguments.fresh:
        shutil.rmtree(RUNS, ignore_errors=True)
    if not arguments.only_table:
        record(RESULT, measure(arguments.seeds))
    write_between(PAGE, MARK, table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
