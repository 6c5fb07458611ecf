"""The figures of a report, drawn without a screen: each is one function of a run, left out where it has no data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kdjax.reporting.record import STEP_PARTS, RunRecord

# Told apart by the colour-blind too, and legible on white as on near-black.
COLOURS = ["#3b7fc4", "#e07b39", "#2f9e77", "#a06bc4", "#c4a000", "#c74a5b"]
BLUE, ORANGE, GREEN, PURPLE, *_ = COLOURS
GREY = "#8b919c"
INK = "#2a2e35"
"""Text and axes; a page gives them its own colour."""

STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
SIZE = (4.9, 3.2)


@dataclass(frozen=True)
class Drawn:
    """A figure, the name of its file, and what it shows, for those who cannot see it."""

    name: str
    caption: str
    figure: Figure


def draw(run: RunRecord) -> list[Drawn]:
    """Every figure that the run has numbers for, in the order in which one wants to see them."""
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, (caption, paint) in _FIGURES.items():
            figure = Figure(figsize=SIZE, layout="constrained")
            if paint(run, figure.add_subplot()):
                drawn.append(Drawn(name, caption, figure))
    return drawn


def _lines(run: RunRecord, axes: Axes, names: dict[str, str], **style: str) -> bool:
    """A line for each recorded name, under its label; False when none is recorded. Single points show as dots."""
    found = False
    for name, label in names.items():
        steps, values = run.series(name)
        if steps:
            marker = "o" if len(steps) < 16 else ""
            axes.plot(steps, values, label=label, marker=marker, markersize=3.5, **style)
            found = True
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    return found


def _legend(axes: Axes) -> None:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="best", handlelength=1.4)


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))


def _shares(run: RunRecord, axes: Axes, names: dict[str, str]) -> None:
    """Dashed lines on a scale of their own at the right, from 0 to 100 %, and the legend of all lines above them."""
    right = axes.twinx()
    right.set_prop_cycle(color=COLOURS[len(axes.lines) :])
    _lines(run, right, names, linestyle="--")
    _percent(right)
    right.set_yticks([0, 0.25, 0.5, 0.75, 1])
    right.grid(visible=False)
    low, high = min(0.0, axes.get_ylim()[0]), axes.get_ylim()[1]
    axes.set_ylim(low, high + 0.4 * (high - low))  # room for the legend, on both scales
    right.set_ylim(0, 1.4)
    right.legend(handles=[*axes.lines, *right.lines], loc="upper left", ncols=2, handlelength=1.6, columnspacing=1.2)


def _training_loss(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Training loss and its parts")
    axes.set_ylabel("nats a token")
    found = _lines(run, axes, {name: name for name in run.parts})
    _legend(axes)
    return found


def _beside_teacher(run: RunRecord, axes: Axes, title: str, name: str) -> bool:
    """The student's held-out ``name``, and the teacher's as a level line where there is one."""
    axes.set_title(title)
    axes.set_ylabel("nats a token")
    found = _lines(run, axes, {f"eval/{name}": "student"})
    _, teacher = run.series(f"eval/teacher_{name}")
    if teacher:
        axes.axhline(teacher[-1], color=GREY, linestyle=(0, (4, 3)), label="teacher")
    _legend(axes)
    return found


def _held_out_loss(run: RunRecord, axes: Axes) -> bool:
    return _beside_teacher(run, axes, "Held-out cross-entropy", "ce")


def _entropy(run: RunRecord, axes: Axes) -> bool:
    return _beside_teacher(run, axes, "Held-out entropy", "entropy")


def _held_out_divergence(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Held-out divergence from the teacher")
    axes.set_ylabel("nats a token")
    found = _lines(run, axes, {"eval/kl": "KL(teacher ‖ student)", "eval/rkl": "KL(student ‖ teacher)"})
    axes.set_ylim(bottom=0)
    _legend(axes)
    return found


def _agreement(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Held-out tokens")
    names = {"eval/agreement": "same choice as the teacher", "eval/accuracy": "choice is the label"}
    found = _lines(run, axes, names)
    _percent(axes)
    _legend(axes)
    return found


def _kl_by_position(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("KL by position in the response")
    axes.set_ylabel("nats a token")
    axes.set_xlabel("tokens of the response before it")
    steps = [step for step, values in run.evaluations.items() if any(n.startswith("kl_at/") for n in values)]
    shown = list(dict.fromkeys([*steps[:1], *steps[-1:]]))
    for i, (step, colour) in enumerate(zip(shown, (GREY, BLUE)[-len(shown) :], strict=True) if shown else ()):
        buckets = {n.removeprefix("kl_at/"): v for n, v in run.evaluations[step].items() if n.startswith("kl_at/")}
        width = 0.8 / len(shown)
        places = [place - 0.4 + width * (i + 0.5) for place in range(len(buckets))]
        axes.bar(places, list(buckets.values()), width=width * 0.94, color=colour, label=f"step {step}")
        axes.set_xticks(range(len(buckets)), list(buckets))
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.25)  # the legend's room, above the bars
    _legend(axes)
    return bool(shown)


def _responses(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("The student's responses")
    axes.set_ylabel("tokens")
    found = _lines(run, axes, {"rollout/length": "mean length"})
    if found:
        _shares(run, axes, {"rollout/eos_rate": "ended by itself", "rollout/truncated": "cut at the limit"})
    return found


def _on_rollouts(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Student and teacher on responses")
    axes.set_ylabel("nats a token")
    found = _lines(run, axes, {"rollout/kl": "KL(student ‖ teacher)", "rollout/entropy": "student's entropy"})
    if found:
        _shares(run, axes, {"rollout/overlap": "teacher's top 5 shared"})
    return found


def _engine_gap(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Trainer and rollout engine apart")
    axes.set_ylabel("nats a token")
    found = _lines(run, axes, {"rollout/k3": "k3"})
    limit = run.config.get("rollout", {}).get("max_k3")
    if found and limit is not None:
        axes.axhline(limit, color=GREY, linestyle=(0, (4, 3)), label=f"stops above {limit:g}")
    if any(value > 0 for value in run.series("rollout/k3")[1]):
        axes.set_yscale("log")
    _legend(axes)
    return found


def _reward(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Reward of the responses")
    return _lines(run, axes, {"rollout/reward": "mean reward"}, color=ORANGE)


def _learning_rate(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return _lines(run, axes, {"learning_rate": "learning rate"}, color=PURPLE)


def _gradient_norm(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Gradient norm")
    found = _lines(run, axes, {"grad_norm": "before clipping"}, color=GREEN)
    clip = run.config.get("train", {}).get("max_grad_norm")
    if found and clip is not None:
        axes.axhline(clip, color=GREY, linestyle=(0, (4, 3)), label=f"clipped to {clip:g}")
    _, values = run.series("grad_norm")
    if values and 0 < min(values) and max(values) > 50 * min(values):
        axes.set_yscale("log")
    _legend(axes)
    return found


def _throughput(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Tokens a second")
    found = _lines(run, axes, {"tokens_per_second": "tokens a second"}, color=ORANGE)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return found


def _step_time(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("A step's seconds")
    axes.set_ylabel("seconds")
    axes.set_xlabel("step")
    records = [record for record in run.training if "seconds/student" in record]
    steps = [record["step"] for record in records]
    names = [name for name in STEP_PARTS if any(f"seconds/{name}" in record for record in records)]
    parts = [[record.get(f"seconds/{name}", 0.0) for record in records] for name in names]
    if len(steps) > 1:
        axes.stackplot(steps, parts, labels=names, colors=(BLUE, ORANGE, PURPLE, GREY), alpha=0.75, linewidth=0)
        _lines(run, axes, {"seconds/teacher": "teacher, alongside"}, color=GREEN, linestyle="--")
        _lines(run, axes, {"seconds/generate": "generation, alongside"}, color=GREEN, linestyle=":")
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend above what is filled
        axes.legend(loc="upper left", ncols=2, handlelength=1.4, columnspacing=1.2)
    return len(steps) > 1


def _run_time(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Where the run's time went")
    total = sum(run.seconds.values())
    large = {name: value for name, value in run.seconds.items() if value >= 0.01 * total}
    rest = total - sum(large.values())
    shown = large | ({"the rest": rest} if rest else {})
    names, values = list(shown)[::-1], list(shown.values())[::-1]
    colours = [BLUE if name.startswith("steps:") else GREY for name in names]
    axes.barh(names, values, color=colours, height=0.68)
    for place, value in enumerate(values):
        axes.annotate(_duration(value), (value, place), (5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.25 * max(values, default=1))
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    return bool(values)


def _pool(run: RunRecord, axes: Axes) -> bool:
    axes.set_title("Rows of the hidden pool in use")
    found = _lines(run, axes, {"pool/used": "at the log line", "pool/peak": "at most so far"})
    axes.set_ylim(0, 1.05)
    _percent(axes)
    _legend(axes)
    return found


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


_FIGURES: dict[str, tuple[str, Callable[[RunRecord, Axes], bool]]] = {
    "loss": ("training loss and its parts by step", _training_loss),
    "held_out_loss": ("cross-entropy of held-out rows by step, the teacher's as a dashed line", _held_out_loss),
    "held_out_kl": ("divergence from the teacher on held-out rows by step", _held_out_divergence),
    "held_out_tokens": ("share of held-out tokens where the student's choice is the teacher's, or right", _agreement),
    "kl_by_position": ("KL from the teacher by position in the response, before and after", _kl_by_position),
    "entropy": ("entropy of the student and the teacher on held-out rows by step", _entropy),
    "rollout_responses": ("length of the student's responses, and shares that ended or were cut, by step", _responses),
    "rollout_kl": ("reverse KL, entropy and overlap of likely tokens on the student's responses by step", _on_rollouts),
    "rollout_k3": ("disagreement of trainer and rollout engine about sampled tokens by step", _engine_gap),
    "rollout_reward": ("mean reward of the student's responses by step", _reward),
    "gradient_norm": ("gradient norm by step", _gradient_norm),
    "learning_rate": ("learning rate by step", _learning_rate),
    "throughput": ("tokens a second by step", _throughput),
    "step_time": ("seconds of a step by what they went into", _step_time),
    "run_time": ("wall time of the whole run by what it went into", _run_time),
    "pool": ("share of the hidden pool in use by step", _pool),
}
