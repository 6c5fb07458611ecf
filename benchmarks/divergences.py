"""Each divergence in the fused loss against unchunked logits, at the vocabularies of real models: time and memory.

    python -m benchmarks.divergences                         # every one of them: half an hour on two cores, 12 GB
    python -m benchmarks.divergences --only kl jsd

All nine at 512 rows, KL and JSD also at 4,096. Hidden rows are narrow, so that a pass takes seconds and what is
compared is the work on logits rather than matrix products, which are the same on both sides.
``benchmarks.fused_loss`` has a shape as models have it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax

from benchmarks.fused_loss import measure, show
from benchmarks.naive import DIVERGENCES
from benchmarks.record import record
from benchmarks.timing import SECONDS

RESULT = Path(__file__).resolve().parent / "results" / "divergences.json"
VOCABULARIES = {"32k": 32_000, "128k": 128_256, "152k": 151_936}  # Llama 2, Llama 3, Qwen 3
WIDTHS = dict(width=64, teacher_width=128)
FEW, MANY = 512, 4_096
AT_MANY = ("kl", "jsd")
LIMIT = 11e9  # bytes: what plans more is not timed
TORCH_LOGITS = 8  # tensors of logits that torch's eager graph holds at once, the gradients' included


def cases(only: list[str]) -> list[tuple[str, int, str]]:
    """Divergence, rows and vocabulary, the quick ones first."""
    few = [(name, FEW, size) for size in VOCABULARIES for name in only]
    return few + [(name, MANY, size) for size in VOCABULARIES for name in only if name in AT_MANY]


def run(only: list[str], seconds: float = SECONDS) -> dict[str, Any]:
    results = {}
    for name, rows, size in cases(only):
        shape = dict(rows=rows, vocabulary=VOCABULARIES[size], **WIDTHS)
        with_torch = TORCH_LOGITS * 4 * rows * shape["vocabulary"] <= LIMIT
        title = f"{name}, {rows} rows, {size}"
        results[title] = measure(name, shape, with_torch, LIMIT, seconds)
        show(title, results[title])
        jax.clear_caches()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    record(arguments.out, {"limit_bytes": LIMIT, "cases": run(arguments.only)})


if __name__ == "__main__":
    main()
