"""What each committed result says, line by line: the goal, and where in the file the number stands.

A line reads a result as ``record`` wrote it. A number that a file lacks raises KeyError, and is then not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

from benchmarks.divergences import AT_MANY, FEW, MANY, VOCABULARIES
from benchmarks.epochs import best
from benchmarks.few_rows import ROWS
from benchmarks.gpu.loss import DEFAULT
from benchmarks.growth import AXES
from benchmarks.naive import DIVERGENCES
from benchmarks.record import spread
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


def _held_out(r: Result, other: str, ours: str = "kd", which: str = "final") -> Found:
    gaps = [a["final"]["ce"] - b[which]["ce"] for a, b in zip(r["runs"][ours], r["runs"][other], strict=True)]
    return Found(f"{mean(gaps):+.3f} nats a token ({min(gaps):+.3f} to {max(gaps):+.3f})", mean(gaps))


def _epochs(r: Result) -> Found:
    (step, ours), (other, theirs) = (best(r, name) for name in ("kd_epochs", "sft_epochs"))
    return Found(f"{ours - theirs:+.3f} nats a token (steps {step:,} and {other:,})", ours - theirs)


def _exact_match(r: Result, drawn: str, other: str = "off_policy") -> Found:
    ours, theirs = (
        {key: mean(run[key] for run in r["runs"][name]) for key in (drawn, "tokens")} for name in ("on_policy", other)
    )
    gap = 100 * (ours[drawn] - theirs[drawn])
    text = f"{gap:+.1f} points, {ours[drawn]:.1%} against {theirs[drawn]:.1%}"
    return Found(f"{text}, on {ours['tokens'] / theirs['tokens']:.2f} times the tokens", gap)


def _loss(r: Result) -> Result:
    return r["loss"]["kl"]["fused"][DEFAULT]


def _loss_memory(r: Result) -> Found:
    value = _loss(r)["bytes_above_inputs"] / 1e9
    return Found(f"{value:.2f}", value)


def _other_chunks(r: Result) -> Found:
    others = {name: case for name, case in r["loss"]["kl"]["fused"].items() if name != DEFAULT}
    each = []
    for name, case in others.items():
        ratio, memory = case["times_the_floor"]["ratio"], case["bytes_above_inputs"] / 1e9
        each.append(f"{ratio:.2f} and {memory:.2f} GB ({name.removeprefix('chunks of ')})")
    return Found(", ".join(each))


def _jsd(r: Result) -> Found:
    case = r["loss"]["jsd"]["fused"][DEFAULT]
    found = _ratio(case["times_the_floor"])
    return Found(f"{found.text}, {case['bytes_above_inputs'] / 1e9:.2f} GB", found.value, found.spread)


def _liger(r: Result) -> Found:
    ours, liger = (r["loss"]["liger"]["fused"][name] for name in (DEFAULT, "liger"))
    found = _ratio(quotient(ours["repetitions"], liger["repetitions"]))
    memory = ours["bytes_above_inputs"] / liger["bytes_above_inputs"]
    return Found(f"time {found.text}, memory {memory:.2f}", found.value, found.spread)


def _mfu(r: Result, size: str) -> Found:
    tried = {name: case for name, case in r["step"].items() if name.startswith(f"{size},") and case.get("mfu")}
    if not tried:
        raise KeyError(size)
    best = max(tried, key=lambda name: tried[name]["mfu"])
    text = ", ".join(f"{case['mfu']:.1%} ({name.removeprefix(f'{size}, ')})" for name, case in tried.items())
    return Found(text, tried[best]["mfu"], tried[best]["spread"])


def _speed(r: Result, *keys: str) -> Found:
    """tokens/s of a run's windows"""
    found = _at(r, "runs", *keys)
    return Found(f"{found['median']:,.0f}", found["median"], found["spread"])


def _seconds(r: Result) -> Found:
    """of the parts of a step"""
    run = r["runs"]["off-policy, overlapped"]
    text = ", ".join(f"{name} {run[name]['seconds']:.3f}" for name in ("teacher", "transfer", "student"))
    return Found(f"{text}, all of it {run['step']['seconds']:.3f}", None, run["step"]["spread"])


def _of_turns(r: Result) -> Found:
    """every window against every window, as the two runs did not take turns"""
    one, other = (r["runs"][f"off-policy, {how}"]["step"]["repetitions"] for how in ("overlapped", "in turns"))
    ratio = spread([a / b for a in one for b in other])
    return Found(f"{ratio['seconds']:.2f}", ratio["seconds"], ratio["spread"])


def _prefill(r: Result) -> Found:
    """of a teacher that works alone, window by window"""
    turns = r["runs"]["off-policy, in turns"]
    each = (turns[name]["repetitions"] for name in ("tokens_per_second", "step", "teacher"))
    speeds = spread([speed * step / teacher for speed, step, teacher in zip(*each, strict=True)])
    return Found(f"{speeds['seconds']:,.0f}", speeds["seconds"], speeds["spread"])


def _synced(r: Result) -> Found:
    run = r["runs"]["on-policy"]
    seconds = run["sync"]["seconds"]
    text = f"{seconds:.2f} s of a step of {run['step']['seconds']:.2f} s, {run['sync_bytes_per_second'] / 1e9:.1f} GB/s"
    return Found(text, seconds, run["sync"]["spread"])


def _rates(r: Result, *ways: tuple[str, ...]) -> Found:
    """GB/s of each, whose last key is its name"""
    each = [_at(r, *way) for way in ways]
    text = ", ".join(f"{way[-1]} {x['bytes_per_second'] / 1e9:.1f}" for way, x in zip(ways, each, strict=True))
    return Found(text, None, max(x["spread"] for x in each))


def _given_back(r: Result, *names: str) -> Found:
    each = {name: r["sharing"]["allocators"][name] for name in names}
    shares = {name: f"{x['given_back'] / x['taken']:.0%}" if x["taken"] else "took nothing" for name, x in each.items()}
    return Found(", ".join(f"{name} {share}" for name, share in shares.items()))


def _slept(r: Result) -> Found:
    engine = r["sharing"]["engine"]
    freed, asleep, awake = median(engine["sleep"]["driver_gained"]), *(engine[x]["seconds"] for x in ("sleep", "wake"))
    text = f"{freed / 1e9:.1f} of {engine['taken'] / 1e9:.1f} GB; asleep in {asleep:.2f} s, awake in {awake:.2f} s"
    return Found(text, freed / engine["taken"], engine["sleep"]["spread"])


LINES: dict[str, tuple[Line, ...]] = {
    "transport": tuple(_transport()),
    "transport_engine": (
        Line(
            "prefill by a real SGLang engine, rows as its own return_hidden_states, of the pool's seconds",
            ratio("lists_of_the_pool"),
        ),
    ),
    "fused_loss": (
        Line(
            "fused KL, 4,096 rows, V 152k: time, of plain JAX's",
            ratio_of(("large", "fused"), ("large", "naive")),
            most=1.3,
        ),
        Line("the same: planned memory, of plain JAX's", number("large", "memory_ratio", form="{:.3f}"), most=1 / 8),
        Line("fused KL, 2,048 rows, V 33k: time, of torch's", ratio_of(("medium", "fused"), ("medium", "torch"))),
    ),
    "divergences": tuple(
        Line(f"fused {name}, {rows:,} rows, V 32k to 152k: share of", partial(_divergence, name=name, rows=rows))
        for rows in (FEW, MANY)
        for name in (DIVERGENCES if rows == FEW else AT_MANY)
    ),
    "trl_gkd": tuple(
        line
        for case, of in (("quickstart", "the quickstart's models"), ("large vocabulary", "as small, V 152k"))
        for line in (
            Line(f"tokens/s, times TRL's GKDTrainer, {of}", ratio(case, "ratio"), least=3),
            Line(
                "the same: share of the time that its matrix products need",
                number(case, "floor", "share", "kdjax", form="{:.0%}"),
            ),
            Line(
                "the same: largest relative gap of the losses to TRL's",
                number(case, "losses", "largest_relative_gap", form="{:.1e}"),
                most=1e-3,
            ),
        )
    ),
    "overlap": (
        Line("overlapped step, of max(teacher, student)", ratio("against_the_slower_alone"), most=1.1),
        Line("overlapped step, of one in turns", ratio("against_turns")),
    ),
    "growth": (
        *(Line(f"step, {axis} {AXES[axis][-2]:,} → {AXES[axis][-1]:,}", partial(_grown, axis=axis)) for axis in AXES),
        Line("padding of GSM8K", _padding),
    ),
    "quickstart": (
        Line("held-out cross-entropy, distilled − fine-tuned for as many steps", partial(_held_out, other="sft_steps")),
        Line("the same, for as many seconds", partial(_held_out, other="sft_seconds")),
        Line(
            "the same, in twice the steps, at the fine-tuned one's own best step",
            partial(_held_out, other="sft_long", ours="kd_long", which="best"),
        ),
    ),
    "few_rows": (
        Line(
            f"the same, on {ROWS} rows, at the fine-tuned one's own best step",
            partial(_held_out, ours="kd_few", other="sft_few", which="best"),
        ),
    ),
    "epochs": (
        Line("the same, on all rows for many epochs, SFT at its best step in twice the steps, one seed", _epochs),
    ),
    "on_policy": (
        Line(
            "sums answered exactly, at temperature 1: on-policy (reverse KL) − off-policy (forward KL)",
            partial(_exact_match, drawn="sampled"),
            least=0,
        ),
        Line("the same, greedily", partial(_exact_match, drawn="greedy")),
        Line(
            "at temperature 1: on-policy − off-policy, both by reverse KL",
            partial(_exact_match, drawn="sampled", other="off_policy_rkl"),
            least=0,
        ),
        Line("the same, greedily", partial(_exact_match, drawn="greedy", other="off_policy_rkl")),
    ),
}
"""By the file's name, in the order of the table."""

GPU: tuple[Line, ...] = (
    Line(
        "fused KL, 8,192 tokens, H 4,096, V 128k, bf16: time of the matrix products",
        lambda r: _ratio(_loss(r)["times_the_floor"]),
        most=1.35,
    ),
    Line("the same: memory above the inputs, GB", _loss_memory, most=4),
    Line("the same at other sizes of its chunks (rows)", _other_chunks),
    Line("fused JSD there: time of the matrix products, and memory", _jsd, most=1.35),
    Line("the same: share of Liger's", _liger),
    Line("student step, Qwen3 0.6B: MFU", partial(_mfu, size="0.6B")),
    Line("student step, Qwen3 1.7B: MFU", partial(_mfu, size="1.7B"), least=0.5),
    Line("student step, Qwen3 4B: MFU", partial(_mfu, size="4B"), least=0.5),
    Line("pool by CUDA IPC, of a plain device copy", ratio("pool", "bandwidth", "share_of_plain_copy"), least=0.8),
    Line("wrong runs in 1,000 batches through the pool", number("pool", "fire", "wrong", form="{:.0f}"), most=0),
    Line("end to end with SGLang, tokens/s", lambda r: _speed(r, "off-policy, overlapped", "tokens_per_second")),
    Line("the same: step, of one in turns", _of_turns),
    Line("the same: seconds of a step, the teacher's beside the others", _seconds),
    Line(
        "the same in turns on one GPU, asleep between them: tokens/s",
        lambda r: _speed(r, "colocated", "tokens_per_second"),
    ),
    Line("the teacher's prefill, tokens/s", _prefill),
    Line("weights of an on-policy step to SGLang", _synced),
    Line("weights to an engine, GB/s", lambda r: _rates(r, ("sync", "on the device"), ("sync", "through the host"))),
    Line("SGLang asleep gives the driver", _slept),
    Line(
        "parameters to the host and back, GB/s",
        lambda r: _rates(r, ("sharing", "parameters", "sleep"), ("sharing", "parameters", "wake")),
    ),
    Line(
        "a deleted array given back, by JAX's allocator", lambda r: _given_back(r, "default", "cuda_async", "platform")
    ),
)
"""Of every file that ``benchmarks.gpu`` wrote, whatever its name."""
