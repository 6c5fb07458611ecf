"""Writes the README's table of every result under ``benchmarks/results``: goal, measured, spread; no number by hand.

    python -m benchmarks.table

What has no file, or is not in it, is shown as not measured. A file that no line reads is an error: a result that
nobody sees is one that nobody keeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from benchmarks.lines import GPU, LINES, Line
from benchmarks.record import ROOT, write_between

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
MARK = "<!-- benchmarks table: make bench -->"


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table of results by file name, and under it where each was measured."""
    gpu = {name: result for name, result in results.items() if "gpu" in result}
    if unread := sorted(results.keys() - LINES.keys() - gpu.keys()):
        raise KeyError(f"benchmarks/lines.py says nothing about {', '.join(unread)}")
    rows = [row for name, lines in LINES.items() for row in _rows(name, lines, results.get(name))]
    for name, result in gpu.items() or [("on a GPU", None)]:
        rows += _rows(name, GPU, result)
    heads = ["| what | goal | measured | spread | result |", "|---|---|---|---|---|"]
    return "\n".join([*heads, *rows, "", *map(_about, sorted(results), map(results.get, sorted(results)))]).strip()


def _rows(name: str, lines: Iterable[Line], result: dict[str, Any] | None) -> Iterable[str]:
    for line in lines:
        goal, measured, spread = _goal(line), "not measured", ""
        try:
            found = None if result is None else line.find(result)
        except KeyError:  # a run of some sections only
            found = None
        if found is not None:
            measured = found.text
            if goal:
                missed = (line.least is not None and found.value < line.least) or (
                    line.most is not None and found.value > line.most
                )
                measured = f"{measured}, **missed**" if missed else f"**{measured}**"
            spread = "" if found.spread is None else f"{found.spread:.0%}"
        where = name if result is None else f"[{name}](benchmarks/results/{name}.json)"
        yield f"| {line.what} | {goal} | {measured} | {spread} | {where} |"


def _goal(line: Line) -> str:
    if line.least is not None:
        return f"≥ {line.least:g}"
    return "" if line.most is None else f"≤ {line.most:g}"


def _about(name: str, result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    place = result.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    used = ", ".join(f"{package} {versions[package]}" for package in ("jax", "torch", "sglang") if package in versions)
    return f"- {name}: {place}; {used}; commit {result['commit']}, {result['recorded'][:10]}"


def main() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    write_between(README, MARK, table(results))
    print(f"{README.name}: {len(results)} results")


if __name__ == "__main__":
    main()
