"""A few questions and what the exported student says to them, for a person to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.engine import Sampling
from kdjax.data.prepare import make_encoder


@dataclass(frozen=True)
class Sample:
    """``reference`` is the answer in the held-out rows, None for the question of ``log.sample_prompt``."""

    question: str
    answer: str
    reference: str | None = None


def answer_samples(engine: Any, stream: Any) -> list[Sample]:
    """Greedy answers to ``log.sample_prompt`` and to the first ``log.samples`` held-out documents.

    A document is asked up to its first loss token; one that is all loss is cut in the middle and to be continued.
    """
    log, tokenizer = stream.config.log, stream.tokenizer
    asked: list[tuple[str, np.ndarray, str | None]] = []

    def text(ids: Any) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    if log.sample_prompt is not None:
        ids = make_encoder(stream.config.data, tokenizer).prompt([{"role": "user", "content": log.sample_prompt}])
        asked.append((log.sample_prompt, ids, None))
    for document in stream.documents(log.samples, held_out=True) if log.samples else ():
        first = int(document.loss.argmax())
        cut = first if first > 1 else len(document) // 2
        asked.append((text(document.ids[:cut]), document.ids[:cut], text(document.ids[cut:])))
    if not asked:
        return []
    stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    sampling = Sampling(max_new_tokens=log.sample_tokens, temperature=0.0, stop_ids=stop)
    completions = engine.generate([ids for _, ids, _ in asked], sampling)
    return [Sample(q, text(c.ids), reference) for (q, _, reference), c in zip(asked, completions, strict=True)]
