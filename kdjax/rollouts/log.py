"""Every response of a run on disk, a file of JSON lines a step: to look at, and to go on from after a kill."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np

from bridge.engine import Completion
from kdjax.disk import whole
from kdjax.errors import UserError


@dataclass
class Rollout:
    """One response. ``prompt`` counts the prompts of the run, ``sample`` the responses to one."""

    prompt: int
    sample: int
    source: str
    finish_reason: str
    length: int
    text: str
    version: int
    """Of the weights that wrote it: how many steps had made them."""
    seed: int
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float] = field(repr=False)
    """The engine's, at the sampling temperature."""
    reward: float | None = None
    kl: float | None = None
    """Mean of log q − log p over the response, once the step has looked at it: what it says of the reverse KL."""

    @property
    def completion(self) -> Completion:
        ids, logprobs = np.array(self.ids, np.int32), np.array(self.logprobs, np.float32)
        return Completion(ids, logprobs, self.finish_reason, self.version)


class RolloutLog:
    """The folder of these files. ``run`` identifies the configuration: what another one wrote is not read back."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._run = folder, run

    def path(self, number: int) -> Path:
        return self._folder / f"step_{number:06d}.jsonl"

    def write(self, number: int, rollouts: list[Rollout]) -> None:
        """The file of a step, whole or not at all. Raises UserError where the disk does not take it."""
        lines = [{"run": self._run, "step": number}, *(asdict(rollout) for rollout in rollouts)]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole(self.path(number), durable=True) as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        except OSError as error:
            raise UserError(
                f"{self.path(number)}: cannot be written ({error.strerror}); mend that and run the same command again"
            ) from None

    def read(self, number: int) -> list[Rollout] | None:
        """What the step's file holds; None where there is none of this run. Raises UserError for a damaged file."""
        path = self.path(number)
        if not path.exists():
            return None
        try:
            with path.open(encoding="utf-8") as file:  # a line ends at \n alone: responses may hold other separators
                head, *lines = map(json.loads, file)
            return [Rollout(**line) for line in lines] if head["run"] == self._run else None
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: not a file of rollouts ({error}); delete it, and they are drawn again") from None

    def set_aside(self, number: int) -> None:
        """Rename the files of the steps from ``number`` on: they stay to be looked at, and are not read back."""
        for path in self._folder.glob("step_*.jsonl"):
            if path >= self.path(number):
                path.replace(path.with_name(f"refused_{path.name}"))


def shown(logprobs: np.ndarray) -> list[float]:
    """float32 numbers as JSON that reads back to the same bits."""
    return [float(f"{x:.9g}") for x in logprobs.tolist()]


def describe(rollouts: list[Rollout], done: int) -> dict[str, float]:
    """Numbers about a step's responses; ``done`` steps had been made when they were asked for."""
    count = len(rollouts)
    numbers: dict[str, Any] = {
        "length": np.mean([r.length for r in rollouts]),
        "eos_rate": sum(r.finish_reason == "stop" for r in rollouts) / count,
        "truncated": sum(r.finish_reason == "length" for r in rollouts) / count,
        "empty": sum(is_empty(r) for r in rollouts) / count,
        "samples": count,
        "staleness": np.mean([done - r.version for r in rollouts]),
        "distinct_1": distinct([r.ids for r in rollouts], 1),
        "distinct_2": distinct([r.ids for r in rollouts], 2),
    }
    rewards = [r.reward for r in rollouts if r.reward is not None]
    if rewards:
        numbers["reward"] = np.mean(rewards)
    return {f"rollout/{name}": float(value) for name, value in numbers.items()}


def is_empty(rollout: Rollout) -> bool:
    """Whether it says nothing: its end came at once."""
    return rollout.finish_reason == "stop" and rollout.length == 1


def sample_text(question: str, rollout: Rollout) -> str:
    """Question and response for a person: indented below a line that says where the question is from."""
    ended = "cut at the limit" if rollout.finish_reason == "length" else "ended by itself"
    told = f"{rollout.source}, answered in {rollout.length} tokens, {ended}"
    return f"{told}\n{indent(question.strip(), '    > ')}\n{indent(rollout.text.strip(), '    ')}"


def distinct(texts: list[list[int]], n: int) -> float:
    """Share of the n-grams of all texts that are different (Li et al., 1510.03055); 1 where there is none."""
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
