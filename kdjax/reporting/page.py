"""The report's page: one HTML file that asks for nothing else, with the figures drawn into it."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kdjax.disk import write_whole
from kdjax.reporting.figures import INK, Drawn, draw
from kdjax.reporting.record import RunRecord

METRICS = {
    "ce": ("cross-entropy, nats a token", "↓"),
    "perplexity": ("perplexity", "↓"),
    "accuracy": ("next token right", "↑"),
    "kl": ("KL(teacher ‖ student)", "↓"),
    "rkl": ("KL(student ‖ teacher)", "↓"),
    "agreement": ("same choice as the teacher", "↑"),
    "entropy": ("entropy of the student", ""),
    "teacher_ce": ("cross-entropy of the teacher", ""),
    "teacher_entropy": ("entropy of the teacher", ""),
}
_LARGE = {"ce": "cross-entropy", "kl": "KL from the teacher", "agreement": "agreement with the teacher"}
_SHARES = {"accuracy", "agreement"}


@dataclass(frozen=True)
class Number:
    """A number that stands large at the top."""

    name: str
    value: str
    note: str = ""


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into the run folder; returns the page.

    Raises UserError when the folder holds no run, or one that has recorded nothing yet.
    """
    run = RunRecord.load(folder)
    figures = draw(run)
    pictures = run.folder / "figures"
    pictures.mkdir(exist_ok=True)
    for drawn in figures:
        drawn.figure.savefig(pictures / f"{drawn.name}.png", dpi=160, facecolor="white")
    page = run.folder / "report.html"
    write_whole(page, render(run, figures))
    return page


def render(run: RunRecord, figures: list[Drawn]) -> str:
    """The page as text."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    steps = _columns(run)
    return templates.get_template("page.html").render(
        title=run.folder.resolve().name,
        status=_status(run),
        finished="finished" in run.about,
        models=_models(run.config),
        numbers=_numbers(run),
        columns=[(_column(step), _kind(run, step, steps)) for step in steps],
        rows=[(name, better, *values) for name, better, *values in _rows(run, steps)],
        figures=[(drawn.caption, _svg(drawn)) for drawn in figures],
        samples=run.about.get("samples", []),
        changed=[(name, yaml.safe_dump(value, default_flow_style=True, width=10**6)) for name, value in run.changed],
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        facts=_facts(run),
    )


def _status(run: RunRecord) -> str:
    steps = run.about.get("steps")
    if "finished" in run.about:
        early = f" of {steps}" if steps and run.last_step < steps else ""
        return f"finished at step {run.last_step:,}{early}"
    return f"not finished: step {run.last_step:,}" + (f" of {steps:,}" if steps else "")


def _models(config: dict[str, Any]) -> str:
    student, teacher = (config.get(side, {}).get("path") for side in ("student", "teacher"))
    student = f"{student or 'a student of its own shape'}"
    if config.get("student", {}).get("init") == "random":
        student += " (random weights)"
    if teacher is None:
        return f"{student}, supervised fine-tuning"
    distill = config.get("distill", {})
    return f"{teacher} → {student}, {distill.get('algorithm')} with {distill.get('loss')}"


def _numbers(run: RunRecord) -> list[Number]:
    """Held-out numbers before and after, then speed and time."""
    numbers = []
    known = run.evaluations
    if known:
        first, last = known[min(known)], known.get(run.kept_step, known[max(known)])
        for name, label in _LARGE.items():
            if name in last:
                before = "" if len(known) < 2 else f"from {_value(name, first[name])}"
                teacher = f"teacher {_value(name, last['teacher_ce'])}" if name == "ce" and "teacher_ce" in last else ""
                numbers.append(Number(label, _value(name, last[name]), ", ".join(filter(None, [before, teacher]))))
    elif run.training:
        first, last = run.training[0], run.training[-1]
        numbers.append(Number("training loss", f"{last['loss']:.3f}", f"from {first['loss']:.3f}"))
    _, speeds = run.series("tokens_per_second")
    if speeds:
        middle = sorted(speeds)[len(speeds) // 2]
        numbers.append(Number("tokens a second", f"{middle:,.0f}", run.about.get("devices", "")))
    numbers.append(Number("wall time", _clock(sum(run.seconds.values())), f"{run.last_step:,} steps"))
    return numbers


def _columns(run: RunRecord, most: int = 5) -> list[int]:
    """Steps of the table: the first and last evaluation, the kept one, and an even choice between."""
    known = sorted(run.evaluations)
    stride = max(1, math.ceil((len(known) - 1) / (most - 1)))
    return sorted({*known[::stride], *known[-1:], run.kept_step} & set(known))


def _column(step: int) -> str:
    return "before" if step == 0 else f"step {step:,}"


def _kind(run: RunRecord, step: int, steps: list[int]) -> str:
    """Of a column: the kept one stands out, and those between make room on a narrow screen."""
    return "kept" if step == run.kept_step else "" if step in (steps[0], steps[-1]) else "between"


def _rows(run: RunRecord, steps: list[int]) -> list[tuple[str, ...]]:
    """(name, better direction, a value for each step)"""
    table = {step: _with_perplexity(run.evaluations[step]) for step in steps}
    names = {name: None for values in table.values() for name in values if not name.startswith("kl_at/")}
    ordered = [n for n in METRICS if n in names] + [n for n in names if n not in METRICS]

    def cells(name: str) -> list[str]:
        return [_value(name, table[step][name]) if name in table[step] else "–" for step in steps]

    return [(*METRICS.get(name, (name, "")), *cells(name)) for name in ordered]


def _with_perplexity(values: dict[str, float]) -> dict[str, float]:
    return values | ({"perplexity": math.exp(values["ce"])} if values.get("ce", 99.0) < 50 else {})


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    about = run.about
    facts = [("folder", str(run.folder)), ("started", about.get("started")), ("finished", about.get("finished"))]
    if about.get("resumed_at"):
        facts.append(("last resumed at step", f"{about['resumed_at']:,}"))
    if about.get("parameters"):
        facts.append(("student", f"{about['parameters']:,} parameters"))
    if about.get("export_gap") is not None:
        facts.append(("export", f"log-probabilities within {about['export_gap']:.1e} of transformers'"))
    facts += [("devices", about.get("devices")), ("machine", about.get("platform")), ("Python", about.get("python"))]
    facts += [("versions", ", ".join(f"{name} {found}" for name, found in about.get("versions", {}).items()))]
    return [(name, value) for name, value in facts if value]


def _value(name: str, value: float) -> str:
    if name in _SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _svg(drawn: Drawn) -> Markup:
    """The figure as an element of the page, in the page's own font and text colour."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": drawn.name, "svg.fonttype": "none"}):
        drawn.figure.savefig(out, format="svg", transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    return Markup(text.replace(INK, "currentColor"))
