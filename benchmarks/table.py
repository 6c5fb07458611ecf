"""Writes the README's table of every result under ``benchmarks/results``: goal, measured, spread; no number by hand.

    python -m benchmarks.table

What has no file, or is not in it, is named below the table as not measured, by file. A file that no line reads is an
error: a result that nobody sees is one that nobody keeps.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.lines import GPU, LINES, Found, Line
from benchmarks.record import ROOT, write_between

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
MARK = "<!-- benchmarks table: make bench -->"


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table of results by file name; under it what is not measured yet, and where each file was measured."""
    gpu = {name: result for name, result in results.items() if "gpu" in result}
    if unread := sorted(results.keys() - LINES.keys() - gpu.keys()):
        raise KeyError(f"benchmarks/lines.py says nothing about {', '.join(unread)}")
    lines = [(name, line, results.get(name)) for name, each in LINES.items() for line in each]
    lines += [(name, line, result) for name, result in gpu.items() or [("gpu", None)] for line in GPU]
    found = [(name, line, _found(line, result)) for name, line, result in lines]
    rows = [_row(name, line, number) for name, line, number in found if number]
    missing = dict.fromkeys(name for name, _, number in found if not number)
    heads = ["| what | goal | measured | spread | result |", "|---|---|---|---|---|"]
    parts = [f"parts of {name}" if name in results else name for name in missing]
    unmeasured = [f"Not measured yet: {', '.join(parts)}.", ""] if parts else []
    about = [_about(name, results[name]) for name in sorted(results)]
    return "\n".join([*heads, *rows, "", *unmeasured, *about]).strip()


def _found(line: Line, result: dict[str, Any] | None) -> Found | None:
    try:
        return None if result is None else line.find(result)
    except KeyError:  # a run of some sections only
        return None


def _row(name: str, line: Line, found: Found) -> str:
    measured = found.text
    if goal := _goal(line):
        missed = (line.least is not None and found.value < line.least) or (
            line.most is not None and found.value > line.most
        )
        measured = f"{measured}, **missed**" if missed else f"**{measured}**"
    spread = "" if found.spread is None else f"{found.spread:.0%}"
    return f"| {line.what} | {goal} | {measured} | {spread} | [{name}](benchmarks/results/{name}.json) |"


def _goal(line: Line) -> str:
    if line.least is not None:
        return f"≥ {line.least:g}"
    return "" if line.most is None else f"≤ {line.most:g}"


def _about(name: str, result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    place = result.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    used = ", ".join(f"{package} {versions[package]}" for package in ("jax", "torch", "sglang") if package in versions)
    note = f"; {result['note']}" if "note" in result else ""
    return f"- {name}: {place}; {used}; commit {result['commit']}, {result['recorded'][:10]}{note}"


def main() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    write_between(README, MARK, table(results))
    print(f"{README.name}: {len(results)} results")


if __name__ == "__main__":
    main()
