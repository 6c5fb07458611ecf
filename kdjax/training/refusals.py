"""When a run is better ended than gone on with, and what is slow enough to be told before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kdjax.config import Config, RolloutConfig
from kdjax.engines import computes_bfloat16, engine_device
from kdjax.errors import UserError
from kdjax.training.blame import blame
from kdjax.training.device_batch import DeviceBatch
from kdjax.training.step import Step


class Refusal(Exception):
    """A step whose numbers say that something is wrong: ``what``, and how to ``mend`` it."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(what)
        self.what, self.mend = what, mend


def what_costs(config: Config) -> Iterator[str]:
    """Warnings about choices that compute what is asked, and slowly."""
    if config.student.attention == "cudnn" and config.data.packing:
        yield (
            "warning: student.attention=cudnn with data.packing: the kernel takes no segments, so packed documents are "
            "kept apart by a mask of data.max_len² entries a row; with data.packing=false (and train.tokens_per_batch, "
            "but for rollouts) it needs none"
        )
    asks_bfloat16 = config.teacher.path and config.teacher.dtype == "bfloat16"
    if asks_bfloat16 and engine_device() == "cpu" and not computes_bfloat16():
        yield (
            "warning: teacher.dtype=bfloat16 on a CPU without instructions for it (AMX, AVX512-BF16) is many times "
            "slower than float32: set teacher.dtype=auto"
        )


def refuse_nonsense(values: dict[str, float], step: Step, batch: DeviceBatch) -> None:
    """Refuse a step that is not finite, and name the documents that make it so; takes its count out of ``values``."""
    if values.pop("teacher_bad_rows", 0.0) == 0 and math.isfinite(values["loss"] + values["grad_norm"]):
        return
    what, places = blame(step, batch)
    where = f"; it comes from {', '.join(places)}" if places else "; no document fails by itself"
    raise Refusal(
        f"{what} not finite (loss {values['loss']}, gradient norm {values['grad_norm']}){where}",
        "look at the teacher" if "teacher" in what else "lower train.learning_rate, or look at those rows",
    )


def refuse_strangers(values: dict[str, float], rollout: RolloutConfig) -> None:
    """Refuse rollouts of an engine that is not the student that learns."""
    k3 = values.get("rollout/k3")
    if k3 is None or rollout.max_k3 is None or k3 <= rollout.max_k3:
        return
    raise Refusal(
        f"trainer and rollout engine disagree about the sampled tokens, k3 = {k3:.3g} nats a token "
        f"(rollout.max_k3={rollout.max_k3}). Either the engine's weights are not the student's (versions up to "
        f"{rollout.max_staleness} steps old are allowed by rollout.max_staleness), or it computes in another dtype "
        f"(rollout.dtype) or numerics; if staleness alone explains it, lower it or the learning rate, or raise "
        f"rollout.max_k3",
        "the same command goes on and has these responses written anew",
    )


def refuse_silence(step: Step, batch: DeviceBatch, algorithm: str) -> None:
    """Refuse an algorithm that would not show when the engine that writes is not the student that learns."""
    if "rollout/k3" not in step.reports(batch):
        raise UserError(
            f"distill.algorithm={algorithm} does not report rollout/k3, so nobody would notice an engine with other "
            f"weights: build its terms with kdjax.algorithms.rollout_terms"
        )
