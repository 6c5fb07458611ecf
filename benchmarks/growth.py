"""How the cost of a step grows with sequence length, batch, vocabulary and layers; what packing saves on GSM8K.

    python -m benchmarks.growth                      # ten minutes on two cores
    python -m benchmarks.growth --only padding

A whole training step (student forward and backward, teacher's logits, KL and cross-entropy, AdamW) of a small Qwen3 in
float32, every position carrying loss. One number is varied at a time from a common shape, and the points of an axis
take turns. Memory is what a step adds to the state, as the process's resident memory shows it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.record import ROOT, record
from benchmarks.shapes import qwen3
from benchmarks.timing import SECONDS, in_turns, peak_bytes, quotient
from kdjax.algorithms import Teacher, make_algorithm
from kdjax.config import from_dict, load_config
from kdjax.data import Batch, DataStream, load_tokenizer
from kdjax.losses import Head
from kdjax.models import load_model
from kdjax.sharding import make_mesh
from kdjax.training.optimizer import make_optimizer
from kdjax.training.sources import to_device
from kdjax.training.step import Step, make_step

RESULT = ROOT / "benchmarks" / "results" / "growth.json"
WIDTH, TEACHER_WIDTH = 256, 512
COMMON = dict(sequence=256, batch=4, vocabulary=8_192, layers=4)
AXES = {
    "sequence": (128, 256, 512, 1_024),
    "batch": (2, 4, 8, 16),
    "vocabulary": (8_192, 32_768, 65_536, 131_072),
    "layers": (2, 4, 8, 16),
}
TEACHER = ROOT / "configs" / "quickstart_teacher.yaml"  # it reads all of GSM8K
BATCH = 8  # whose longest document the others are padded to


def make(sequence: int, batch: int, vocabulary: int, layers: int) -> tuple[Step, Callable[[], float]]:
    """A step of this shape, and a call of it that waits for its loss."""
    config = qwen3(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=WIDTH // 4,
        max_position_embeddings=sequence,
    )
    data = {"train": [{"path": "none"}], "tokenizer": "none"}
    settings = from_dict({"student": {"init": "random", "config": config}, "data": data})
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = load_model(None, mesh=mesh, config=config, init="random")
    weight = jax.random.normal(jax.random.key(1), (vocabulary, TEACHER_WIDTH)) * TEACHER_WIDTH**-0.5
    algorithm = make_algorithm(settings, model, (Teacher(Head(weight, layout="vd"), TEACHER_WIDTH, "random"),))
    step = make_step(model, algorithm, make_optimizer(settings.train, 1000), mesh)
    rng, rows = np.random.default_rng(0), batch * sequence
    tokens = rng.integers(0, vocabulary, (1, batch, sequence), np.int32)
    host = Batch(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(sequence, dtype=np.int32), tokens.shape),
        segment_ids=np.ones(tokens.shape, np.int32),
        rows=np.arange(rows, dtype=np.int32)[None, None],
        labels=np.roll(tokens, -1, -1).reshape(1, rows),
        mask=np.ones((1, rows), bool),
        teacher_hidden=(rng.standard_normal((1, rows, TEACHER_WIDTH), np.float32),),
    )
    arrays = to_device(host, mesh)
    return step, lambda: float(step(arrays)["loss"])


def along(axis: str, values: tuple[int, ...], common: dict[str, int], seconds: float = SECONDS) -> dict[str, Any]:
    """Seconds and bytes of a step at each value of one axis, and by how much its last doubling multiplies them."""
    made = {str(value): make(**common | {axis: value}) for value in values}
    points: dict[str, dict[str, Any]] = {}
    for name, (step, run) in made.items():
        run()  # compiles
        state = sum(x.nbytes for x in jax.tree.leaves(step.state))
        points[name] = {"state_bytes": state, "peak_bytes": peak_bytes(run)}
    for name, timed in in_turns({name: run for name, (_, run) in made.items()}, seconds=seconds).items():
        points[name] |= timed
        print(
            f"{axis:10} {name:>7} {timed['seconds']:8.4f} s ± {timed['spread']:4.0%}  "
            f"{points[name]['peak_bytes'] / 1e6:6.0f} MB above {points[name]['state_bytes'] / 1e6:.0f} MB of state",
            flush=True,
        )
    before, last = (points[str(value)] for value in values[-2:])
    doubled = quotient(last["repetitions"], before["repetitions"])
    doubled["memory"] = last["peak_bytes"] / max(1, before["peak_bytes"])
    return {"common": common, "points": points, "doubled": doubled}


def padding(rows: int | None = None) -> dict[str, Any]:
    """Share of positions that hold no token in an epoch of the quickstart teacher's data, laid out in three ways."""
    found: dict[str, Any] = {}
    for packing in (False, True):
        config = load_config(TEACHER, [f"data.packing={str(packing).lower()}"])
        tokenizer = load_tokenizer(config.data.tokenizer)
        data = DataStream(config.data, tokenizer, batch=BATCH, epochs=1, max_rows=rows)
        hosts = list(data)
        data.close()
        if packing:
            found["packed"] = data.statistics.padding
        else:
            longest = sum(BATCH * max(len(placed.document) for placed in host.documents) for host in hosts)
            found |= {"max_len": config.data.max_len, "batch": BATCH, "documents": data.statistics.documents}
            found |= {"one_a_row": data.statistics.padding}
            found["to_the_longest_of_a_batch"] = 1 - data.statistics.tokens / longest
    shown = ", ".join(f"{name} {found[name]:.1%}" for name in ("one_a_row", "to_the_longest_of_a_batch", "packed"))
    print(f"padding: {shown}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*AXES, "padding"], default=[*AXES, "padding"])
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    found: dict[str, Any] = {"width": WIDTH, "teacher_width": TEACHER_WIDTH, "dtype": "float32"}
    for name in given.only:
        found[name] = padding() if name == "padding" else along(name, AXES[name], COMMON)
        jax.clear_caches()
    record(given.out, found)


if __name__ == "__main__":
    main()
