"""Does a student learn more from its own answers than from given ones? Exact match on held-out sums, several seeds.

    python -m benchmarks.on_policy                        # an hour and a half on two cores
    python -m benchmarks.on_policy --only-table           # write the table anew from the committed results

One student, distilled off-policy for ``WARM_STEPS``, is where every run starts. Each method then takes as many steps
with as many responses a step, so that all train on nearly the same number of tokens, which is recorded. The learning
rate of each is the best of the same ``RATES`` on held-out rows and a seed that are used for nothing else. Stopped, it
goes on where it was, and a run whose configuration has changed since is made anew; ``--fresh`` starts anew with all.
What counts is the exact match of answers drawn as rollouts are, at temperature 1; that of greedy ones stands beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.record import ROOT, machine, record, write_between
from benchmarks.runs import digest, made_at, trained
from kdjax.config import load_config
from kdjax.generation.tasks import evaluate_task
from kdjax.progress import Display

CONFIG = ROOT / "configs" / "arithmetic.yaml"
RUNS = ROOT / "runs" / "benchmark" / "on_policy"
RESULT = ROOT / "benchmarks" / "results" / "on_policy.json"
PAGE = ROOT / "docs" / "generation.md"
MARK = "<!-- on-policy table: python -m benchmarks.on_policy -->"

WARM_STEPS, STEPS, RESPONSES = 800, 200, 32
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TUNING_SEED, TUNING_ROWS = 100, "[:300]"
TEST_ROWS = "[300:]"

METHODS = {
    "off_policy": ("distill.loss=kl",),
    "off_policy_rkl": ("distill.loss=rkl",),
    "on_policy": ("distill.loss=rkl", "distill.on_policy_fraction=1.0"),
    "on_policy_kl": ("distill.loss=kl", "distill.on_policy_fraction=1.0"),
    "mixed": ("distill.loss=rkl", "distill.on_policy_fraction=0.5"),
}
DEFAULT = ("off_policy", "off_policy_rkl", "on_policy", "mixed")
TEMPERATURES = {"sampled": 1.0, "greedy": 0.0}
NAMES = {
    "off_policy": "off-policy, forward KL",
    "off_policy_rkl": "off-policy, reverse KL",
    "on_policy": "**on-policy, reverse KL**",
    "on_policy_kl": "**on-policy, forward KL**",
    "mixed": "half and half (λ = 0.5), reverse KL",
}


def train(out: Path, *overrides: str) -> dict[str, float]:
    """Run the configuration; returns the tokens it trained on and the seconds its steps took."""
    quick = ["log.every=1", "log.report=false", "log.tensorboard=false", "checkpoint.check_export=false"]
    quick += ["train.eval_every=null", "train.eval_rows=1"]
    quick += ["teacher.engine=transformers"]  # of a teacher this small the quicker to start
    steps = [r for r in trained(out, CONFIG, *quick, *overrides) if "loss_tokens" in r]
    return {"tokens": sum(r["loss_tokens"] for r in steps), "seconds": sum(r["seconds/step"] for r in steps)}


def exact_match(model: Path | str, rows: str, out: Path, ways: Iterable[str] = tuple(TEMPERATURES)) -> dict[str, float]:
    """Share of the held-out rows that ``model`` answers rightly, by how its answers are drawn."""
    source = {"path": "examples/arithmetic/eval.jsonl", "split": rows}
    found = {}
    for way in ways:
        drawn = [f"generate.temperature={TEMPERATURES[way]}", f"output={out / way}"]
        config = load_config(CONFIG, [f"data.eval={json.dumps([source])}", *drawn])
        found[way] = evaluate_task(config, model, "gsm8k", display=Display(quiet=True))["accuracy"]
    return found


def run(
    home: Path, method: str, rate: float, seed: int, steps: int, rows: str, ways: Iterable[str] = tuple(TEMPERATURES)
) -> dict[str, Any]:
    """One method from the common student in ``home`` on; returns its exact match, tokens and seconds."""
    out = home / f"{method}-{rate:g}-{seed}"
    shape = [f"train.batch_size={RESPONSES}", f"rollout.prompts={RESPONSES}", "data.packing=false"]
    shape += ["rollout.max_new_tokens=96", "rollout.threads=1"]
    start = [f"student.path={home / 'warm' / 'export'}", "student.init=pretrained", "student.layers=[]"]
    schedule = [f"train.steps={steps}", f"train.learning_rate={rate}", f"train.min_lr={rate / 10}"]
    result = train(out, *shape, *start, *schedule, f"train.seed={seed}", *METHODS[method])
    result |= {"seed": seed, "rate": rate} | exact_match(out / "export", rows, out, ways)
    print(f"{method} rate {rate:g} seed {seed}: {json.dumps(result)}", flush=True)
    return result


def measure(seeds: list[int], warm: int, steps: int, rates: list[float], methods: list[str]) -> dict[str, Any]:
    first = (f"train.steps={warm}", "train.seed=0")
    home = RUNS / digest(CONFIG, *first)  # so that what starts from another student is not taken for these runs
    train(home / "warm", *first)
    found: dict[str, Any] = {"seeds": seeds, "warm_steps": warm, "steps": steps, "responses_a_step": RESPONSES}
    found["teacher"] = exact_match(load_config(CONFIG).teacher.path, TEST_ROWS, home / "teacher")
    found["start"] = exact_match(home / "warm" / "export", TEST_ROWS, home / "warm")
    print(f"teacher {found['teacher']}, common student {found['start']}", flush=True)
    tuning = TUNING_SEED, steps, TUNING_ROWS, ["sampled"]
    found["tuning"] = {method: [run(home, method, rate, *tuning) for rate in rates] for method in methods}
    found["runs"] = {}
    for method, tried in found["tuning"].items():
        best = max(tried, key=lambda result: result["sampled"])["rate"]
        found["runs"][method] = [run(home, method, best, seed, steps, TEST_ROWS) for seed in seeds]
    return {"commit": made_at(home.iterdir())} | found


def table(result: dict[str, Any]) -> str:
    """A Markdown table of means ± standard deviations over the seeds."""

    def shares(entries: list[dict]) -> str:
        each = ([100 * entry[way] for entry in entries] for way in TEMPERATURES)
        return " | ".join(f"{mean(v):.1f}{f' ± {stdev(v):.1f}' if len(v) > 1 else ''} %" for v in each)

    def row(method: str, entries: list[dict]) -> str:
        tokens = mean(entry["tokens"] for entry in entries)
        return f"| {NAMES[method]} | {entries[0]['rate']:g} | {tokens / 1e3:,.0f} k | {shares(entries)} |"

    where, seeds = result["machine"], ", ".join(map(str, result["seeds"]))
    return "\n".join(
        [
            "| | learning rate | tokens trained on | exact match, drawn at temperature 1 | greedily |",
            "|---|---|---|---|---|",
            f"| teacher | | | {shares([result['teacher']])} |",
            f"| common student, before | | | {shares([result['start']])} |",
            *(row(method, entries) for method, entries in result["runs"].items()),
            "",
            f"Mean ± standard deviation over seeds {seeds}; {where['cpu']}, {where['cores']} cores.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--warm-steps", type=int, default=WARM_STEPS, help="off-policy steps of the common student")
    parser.add_argument("--steps", type=int, default=STEPS, help="of every method, behind the common student")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT))
    parser.add_argument("--trial", action="store_true", help="print the table and write nothing down")
    parser.add_argument(
        "--only-table", action="store_true", help="measure nothing, write the table of docs/generation.md"
    )
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier call has left")
    given = parser.parse_args()
    if given.fresh:
        shutil.rmtree(RUNS, ignore_errors=True)
    if given.only_table:
        write_between(PAGE, MARK, table(json.loads(RESULT.read_text())))
        return
    found = measure(given.seeds, given.warm_steps, given.steps, given.rates, given.methods)
    if given.trial:
        print(table({"machine": machine(), **found}))
    else:
        write_between(PAGE, MARK, table(record(RESULT, found)))


if __name__ == "__main__":
    main()
