"""How far does a teacher bring its student? Both trained by one recipe: the quickstart's student alone, and with it.

    python -m benchmarks.epochs                        # two hours on two cores
    python -m benchmarks.epochs --only-table           # write the table anew from the committed results

The recipe is the one that the teacher itself was trained by (``configs/quickstart_teacher.yaml``: rows, batch, rate and
epochs), so what the student reaches by supervised fine-tuning (SFT) is what it can get alone; it is given twice the
epochs too, with a learning rate that falls to the end of each run. One seed. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.quickstart import RUNS, SFT, run
from benchmarks.record import ROOT, record, write_between
from benchmarks.runs import made_at
from kdjax.config import load_config

RESULT = ROOT / "benchmarks" / "results" / "epochs.json"
RECIPE = ROOT / "configs" / "quickstart_teacher.yaml"
PAGE = ROOT / "README.md"
MARK = "<!-- epochs table: python -m benchmarks.epochs -->"
EPOCHS = {"kd_epochs": 6, "sft_epochs": 6, "sft_epochs_twice": 12}
TITLES = {
    "kd_epochs": "**student, distilled**",
    "sft_epochs": "student, SFT",
    "sft_epochs_twice": "student, SFT, twice the epochs",
}
EPOCH = 781  # steps of one
SHOWN = (1, 2, 4, 6, 8, 10, 12)


def overrides() -> list[str]:
    """What makes of the quickstart's configuration one of the teacher's own recipe."""
    recipe = load_config(RECIPE).train
    return [
        *(f"train.{key}={json.dumps(getattr(recipe, key))}" for key in ("batch_size", "learning_rate", "min_lr")),
        *(f"train.{key}={json.dumps(getattr(recipe, key))}" for key in ("warmup_ratio", "weight_decay", "betas")),
        f"train.eval_every={EPOCH}",
    ]


def measure(seed: int = 0) -> dict[str, Any]:
    runs: dict[str, Any] = {}
    for name, epochs in EPOCHS.items():
        more = () if name.startswith("kd") else SFT
        records = [r for r in run(name, seed, epochs * EPOCH, *more, *overrides()) if "eval/ce" in r]
        runs[name] = {
            "epochs": epochs,
            "ce": {str(r["step"] // EPOCH): r["eval/ce"] for r in records},
            "accuracy": records[-1]["eval/accuracy"],
        }
        if not more:
            teacher = records[0]["eval/teacher_ce"]
    found = {"seed": seed, "teacher_ce": teacher, "runs": runs}
    return {"commit": made_at(RUNS / f"{name}-{seed}" for name in EPOCHS)} | found


def best(result: dict[str, Any], name: str) -> tuple[int, float]:
    """The epoch of a run's lowest held-out cross-entropy, and that."""
    ce = result["runs"][name]["ce"]
    epoch = min(ce, key=ce.get)
    return int(epoch), ce[epoch]


def table(result: dict[str, Any]) -> str:
    """A Markdown table of held-out cross-entropy by epoch."""

    def row(name: str) -> str:
        ce = result["runs"][name]["ce"]
        cells = (f"{ce[str(epoch)]:.3f}" if str(epoch) in ce else "" for epoch in SHOWN)
        return f"| {TITLES[name]} | {' | '.join(cells)} |"

    return "\n".join(
        [
            f"| held-out cross-entropy after epochs | {' | '.join(map(str, SHOWN))} |",
            f"|---|{'---|' * len(SHOWN)}",
            *map(row, EPOCHS),
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
