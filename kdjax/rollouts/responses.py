"""what a response is to training: a document whose response carries loss, and an advantage made of its reward."""

from __future__ import annotations

import numpy as np

from bridge.engine import Completion
from kdjax.config import RolloutConfig
from kdjax.data import Document, Prompt
from kdjax.rollouts.log import Rollout


def rollout_document(
    prompt: Prompt, completion: Completion, rollout: RolloutConfig, advantage: float = 0.0
) -> Document | None:
    """Prompt and response as a document whose response carries loss, its end token included.

    None when nothing of a truncated response is to be trained on.
    """
    keep = len(completion.ids)
    if completion.finish_reason == "length" and rollout.truncated != "keep":
        keep = 0 if rollout.truncated == "drop" else keep - rollout.tail
    if keep <= 0:
        return None
    ones = np.ones(keep, np.float32)
    extras = {"on_policy": ones, "behaviour_logprobs": completion.logprobs[:keep], "advantage": ones * advantage}
    seen = [_answered(ids, completion, keep) for ids in (prompt.ids, prompt.teacher_ids) if ids is not None]
    ids, loss, *teacher = (array for pair in seen for array in pair)
    return Document(ids, loss, prompt.source, *(teacher or (None, None)), extras)


def advantages_of(rollouts: list[Rollout], config: RolloutConfig) -> list[float]:
    """Each response's weighted reward, less the mean reward of the others that ``baseline`` compares it with.

    Leaving its own out keeps the estimate of the gradient free of bias (RLOO, 2402.14740).
    """
    rewards = np.array([r.reward or 0.0 for r in rollouts])
    groups = np.array([r.prompt if config.baseline == "group" else 0 for r in rollouts])
    advantages = rewards.copy()
    for group in set(groups.tolist()) if config.baseline != "none" else ():
        here = groups == group
        others = here.sum() - 1
        if others:
            advantages[here] -= (rewards[here].sum() - rewards[here]) / others
    return (config.reward_weight * advantages).tolist()


def _answered(prompt: np.ndarray, completion: Completion, keep: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([prompt, completion.ids])
    place = np.arange(len(ids))
    return ids, (place >= len(prompt)) & (place < len(prompt) + keep)
