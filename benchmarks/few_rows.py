"""Distillation against SFT at its own best step, on half the quickstart's rows: SFT overfits them soon.

    python -m benchmarks.few_rows                        # half an hour on two cores
    python -m benchmarks.few_rows --only-table           # write the table anew from the committed results

Both take as many steps on them. Supervised fine-tuning (SFT) counts with the best of its evaluations, which must lie
before the last, distillation with its last and so with none that was chosen. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from statistics import mean, stdev
from typing import Any

from benchmarks.quickstart import CONFIG, RUNS, SFT, held_out
from benchmarks.record import ROOT, record, write_between
from benchmarks.runs import made_at
from kdjax.config import load_config, to_dict

RESULT = ROOT / "benchmarks" / "results" / "few_rows.json"
PAGE = ROOT / "README.md"
MARK = "<!-- few rows table: python -m benchmarks.few_rows -->"
ROWS, STEPS, EVERY = 250, 1_600, 100
METHODS: dict[str, tuple[str, ...]] = {"kd_few": (), "sft_few": SFT}


def overrides() -> tuple[str, ...]:
    """What a run changes beside the quickstart benchmark's own overrides."""
    (source,) = to_dict(load_config(CONFIG))["data"]["train"]
    return (f"data.train={json.dumps([source | {'max_samples': ROWS}])}", f"train.eval_every={EVERY}")


def measure(seeds: list[int]) -> dict[str, Any]:
    runs = {
        name: [held_out(name, seed, STEPS, *more, *overrides()) for seed in seeds] for name, more in METHODS.items()
    }
    made = made_at(RUNS / f"{name}-{seed}" for name in METHODS for seed in seeds)
    return {"commit": made, "seeds": seeds, "rows": ROWS, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """A Markdown table of means ± standard deviations over the seeds."""

    def row(title: str, name: str, which: str) -> str:
        entries = result["runs"][name]
        ce, right = ([entry[which][key] for entry in entries] for key in ("ce", "accuracy"))
        steps = ", ".join(str(entry["best_step" if which == "best" else "steps"]) for entry in entries)
        spread = f" ± {stdev(ce):.3f}" if len(ce) > 1 else ""
        return f"| {title} | {steps} | {mean(ce):.3f}{spread} | {100 * mean(right):.1f} % |"

    return "\n".join(
        [
            f"| on {result['rows']} rows | step, of each seed | held-out cross-entropy | next token right |",
            "|---|---|---|---|",
            row("**distilled, at its last step**", "kd_few", "final"),
            row("SFT, at its own best step", "sft_few", "best"),
            row("SFT, at its last step", "sft_few", "final"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only-table", action="store_true", help="measure nothing, write the README's table")
    given = parser.parse_args()
    if not given.only_table:
        record(RESULT, measure(given.seeds))
    write_between(PAGE, MARK, table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
