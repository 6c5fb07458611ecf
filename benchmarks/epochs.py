"""How long does a teacher's lead last? The quickstart's student on all of its teacher's rows for many epochs, one seed.

    python -m benchmarks.epochs                        # an hour and a half on two cores
    python -m benchmarks.epochs --only-table           # write the table anew from the committed results

Distillation and supervised fine-tuning (SFT), each with a learning rate that falls to the end of its own run, SFT for
twice as many steps: it is cheaper by the step, and whether it ever overfits is the question. Stopped, it goes on where
it was.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.quickstart import CONFIG, RUNS, SFT, run
from benchmarks.record import ROOT, record, write_between
from benchmarks.runs import made_at
from kdjax.config import load_config, to_dict

RESULT = ROOT / "benchmarks" / "results" / "epochs.json"
PAGE = ROOT / "README.md"
MARK = "<!-- epochs table: python -m benchmarks.epochs -->"
STEPS = {"kd_epochs": 12_000, "sft_epochs": 24_000}
EVERY, EPOCH = 1_000, 2_930  # steps between evaluations, and of an epoch
SHOWN = (1_000, 2_000, 4_000, 8_000, 12_000, 16_000, 20_000, 24_000)


def overrides() -> tuple[str, ...]:
    """What a run changes beside the quickstart benchmark's own overrides."""
    (source,) = to_dict(load_config(CONFIG))["data"]["train"]
    return (f"data.train={json.dumps([source | {'max_samples': None}])}", f"train.eval_every={EVERY}")


def measure(seed: int = 0) -> dict[str, Any]:
    runs = {}
    for name, steps in STEPS.items():
        more = SFT if name == "sft_epochs" else ()
        changed = (*more, *overrides())
        records = [r for r in run(name, seed, steps, *changed) if "eval/ce" in r]
        runs[name] = {"steps": steps, "ce": {str(r["step"]): r["eval/ce"] for r in records}}
        if not more:
            teacher = records[0]["eval/teacher_ce"]
    found = {"seed": seed, "teacher_ce": teacher, "runs": runs}
    return {"commit": made_at(RUNS / f"{name}-{seed}" for name in STEPS)} | found


def best(result: dict[str, Any], name: str) -> tuple[int, float]:
    """The step of a run's lowest held-out cross-entropy, and that."""
    ce = result["runs"][name]["ce"]
    step = min(ce, key=ce.get)
    return int(step), ce[step]


def table(result: dict[str, Any]) -> str:
    """A Markdown table of held-out cross-entropy by step."""

    def row(title: str, name: str) -> str:
        ce = result["runs"][name]["ce"]
        cells = (f"{ce[str(step)]:.3f}" if str(step) in ce else "" for step in SHOWN)
        return f"| {title} | {' | '.join(cells)} |"

    return "\n".join(
        [
            f"| held-out cross-entropy after steps | {' | '.join(f'{step:,}' for step in SHOWN)} |",
            f"|---|{'---|' * len(SHOWN)}",
            f"| (epochs) | {' | '.join(f'{step / EPOCH:.1f}' for step in SHOWN)} |",
            row(f"distilled, in {STEPS['kd_epochs']:,} steps", "kd_epochs"),
            row(f"SFT, in {STEPS['sft_epochs']:,} steps", "sft_epochs"),
            "",
            f"One seed; the teacher's own cross-entropy is {result['teacher_ce']:.3f}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-table", action="store_true", help="measure nothing, write the README's table")
    given = parser.parse_args()
    if not given.only_table:
        record(RESULT, measure())
    write_between(PAGE, MARK, table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
