"""What each committed result says, line by line: the goal, and where in the file the number stands.

A line reads a result as ``record`` wrote it. A number that a file lacks raises KeyError, and is then not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

from benchmarks.divergences import AT_MANY, FEW, MANY, VOCABULARIES
from benchmarks.growth import AXES
from benchmarks.naive import DIVERGENCES
from benchmarks.timing import quotient

Result = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """text: for people. value: what the goal is held against. spread: (max − min) / median over the rounds."""

    text: str
    value: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Line:
    """least, most: the goal, a bound from below or above; neither where there is none."""

    what: str
    find: Callable[[Result], Found]
    least: float | None = None
    most: float | None = None


def _at(result: Result, *keys: str) -> Any:
    for key in keys:
        result = result[key]
    return result


def _ratio(found: Result) -> Found:
    """of a ``quotient``"""
    return Found(f"{found['ratio']:.2f}", found["ratio"], found["spread"])


def ratio(*keys: str) -> Callable[[Result], Found]:
    """the ``quotient`` that stands there"""
    return lambda r: _ratio(_at(r, *keys))


def ratio_of(above: Iterable[str], below: Iterable[str]) -> Callable[[Result], Found]:
    """the quotient of two ``spread``s that were measured in turn"""
    return lambda r: _ratio(quotient(_at(r, *above)["repetitions"], _at(r, *below)["repetitions"]))


def number(*keys: str, form: str) -> Callable[[Result], Found]:
    def find(r: Result) -> Found:
        value = _at(r, *keys)
        return Found(form.format(value), value)

    return find


def _transport() -> Iterable[Line]:
    others = (("pickle", "fp16 pickled over ZMQ", 40), ("pickle, twice", "fp16 pickled over two such sockets", 40))
    others += (("lists", "SGLang's return_hidden_states", 100),)
    for dtype in ("float32", "bfloat16"):

        def shown(r: Result, way: str, dtype: str = dtype) -> Found:
            ways = r[dtype]
            found = _ratio(ways[way]["times_the_pool"])
            speeds = " against ".join(f"{ways[name]['gb_per_second']:.2g}" for name in ("pool", way))
            copies = " against ".join(str(ways[name]["copies"]) for name in ("pool", way))
            return Found(f"{found.text} ({speeds} GB/s, {copies} copies)", found.value, found.spread)

        yield Line(f"hidden rows into JAX, {dtype}: of memcpy's speed", partial(shown, way="memcpy"), least=0.8)
        for way, name, goal in others:
            yield Line(f"the same: times the speed of {name}", partial(shown, way=way), least=goal)


def _divergence(r: Result, name: str, rows: int) -> Found:
    cases = [r["cases"][f"{name}, {rows} rows, {size}"] for size in VOCABULARIES]
    parts, spreads = [], []
    for other in ("naive", "torch"):
        timed = [c for c in cases if "seconds" in c.get(other, {})]
        if timed:
            times = [quotient(c["fused"]["repetitions"], c[other]["repetitions"]) for c in timed]
            peaks = [c["fused"]["peak_bytes"] / c[other]["peak_bytes"] for c in timed]
            spreads += [t["spread"] for t in times]
            many = f", {len(timed)} of {len(cases)} vocabularies" if len(timed) < len(cases) else ""
            title = "JAX" if other == "naive" else other
            parts.append(f"{title}'s time {_range([t['ratio'] for t in times])}, memory {_range(peaks)}{many}")
    return Found("; ".join(parts), None, max(spreads))


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _grown(r: Result, axis: str) -> Found:
    found = r[axis]["doubled"]
    return Found(f"time × {found['ratio']:.2f}, memory × {found['memory']:.2f}", None, found["spread"])


def _padding(r: Result) -> Found:
    p = r["padding"]
    text = f"{p['one_a_row']:.1%} one a row, {p['to_the_longest_of_a_batch']:.1%} padded to the longest of a batch"
    return Found(f"{text}, {p['packed']:.1%} packed")


def _held_out(r: Result, other: str, which: str = "final") -> Found:
    gaps = [a["final"]["ce"] - b[which]["ce"] for a, b in zip(r["runs"]["kd"], r["runs"][other], strict=True)]
    return Found(f"{mean(gaps):+.3f} nats a token ({min(gaps):+.3f} to {max(gaps):+.3f})", mean(gaps))


def _exact_match(r: Result) -> Found:
    means = {name: 100 * mean(run["exact_match"] for run in runs) for name, runs in r["runs"].items()}
    return Found(f"{means['on_policy']:.1f} % against {means['off_policy']:.1f} % off-policy, forward KL")


def _fastest_loss(r: Result, key: str = "floor_ratio", scale: float = 1.0) -> Found:
    tried = {name: case for name, case in r["loss"].items() if name.startswith("kl, ")}
    name = min(tried, key=lambda name: tried[name]["floor_ratio"])
    value = tried[name][key] / scale
    return Found(f"{value:.2f} ({name})", value, tried[name]["spread"])


def _mfu(r: Result, size: str) -> Found:
    tried = {name: case for name, case in r["step"].items() if name.startswith(f"{size},") and case.get("mfu")}
    name = max(tried, key=lambda name: tried[name]["mfu"], default=None)
    if name is None:
        raise KeyError(size)
    return Found(f"{tried[name]['mfu']:.1%} ({name})", tried[name]["mfu"], tried[name]["spread"])


LINES: dict[str, tuple[Line, ...]] = {
    "transport": tuple(_transport()),
    "fused_loss": (
        Line("fused KL, 4,096 rows, V 152k: time of JAX", ratio_of(("large", "fused"), ("large", "naive")), most=1.3),
        Line("the same: planned memory of JAX", number("large", "memory_ratio", form="{:.3f}"), most=1 / 8),
        Line("fused KL, 2,048 rows, V 33k: time of torch", ratio_of(("medium", "fused"), ("medium", "torch"))),
    ),
    "divergences": tuple(
        Line(f"fused {name}, {rows:,} rows, V 32k to 152k: share of", partial(_divergence, name=name, rows=rows))
        for rows in (FEW, MANY)
        for name in (DIVERGENCES if rows == FEW else AT_MANY)
    ),
    "trl_gkd": (
        Line("tokens/s, times TRL's GKDTrainer", ratio_of(("speed", "kdjax"), ("speed", "trl")), least=3),
        Line(
            "the same: share of the time that its matrix products need",
            number("floor", "share", "kdjax", form="{:.0%}"),
        ),
        Line("largest relative gap of the losses to TRL's", number("losses", "largest_relative_gap", form="{:.1e}")),
    ),
    "overlap": (
        Line("overlapped step of max(teacher, student)", ratio("against_the_slower_alone"), most=1.1),
        Line("overlapped step of one in turns", ratio("against_turns")),
    ),
    "growth": (
        *(Line(f"step, {axis} {AXES[axis][-2]:,} → {AXES[axis][-1]:,}", partial(_grown, axis=axis)) for axis in AXES),
        Line("padding of GSM8K", _padding),
    ),
    "quickstart": (
        Line("held-out cross-entropy, distilled − fine-tuned for as many steps", partial(_held_out, other="sft_steps")),
        Line("the same, for as many seconds", partial(_held_out, other="sft_seconds")),
    ),
    "on_policy": (Line("sums answered exactly, on-policy", _exact_match),),
}
"""By the file's name, in the order of the table."""

GPU: tuple[Line, ...] = (
    Line("fused KL, 8,192 tokens, H 4,096, V 128k, bf16: time of the matrix products", _fastest_loss, most=1.35),
    Line("the same: memory above the inputs, GB", partial(_fastest_loss, key="bytes_above_inputs", scale=1e9), most=4),
    Line("student step, Qwen3 0.6B: MFU", partial(_mfu, size="0.6B")),
    Line("student step, Qwen3 1.7B: MFU", partial(_mfu, size="1.7B"), least=0.5),
    Line("student step, Qwen3 4B: MFU", partial(_mfu, size="4B"), least=0.5),
    Line("pool by CUDA IPC, of a plain device copy", number("pool", "share_of_plain_copy", form="{:.2f}"), least=0.8),
    Line("wrong numbers in 1,000 batches through the pool", number("pool", "wrong_numbers", form="{:.0f}"), most=0),
    Line("end to end with SGLang, tokens/s", number("engine", "tokens_per_second", form="{:,.0f}")),
)
"""Of every file that ``benchmarks.gpu`` wrote, whatever its name."""
