"""The ``generate`` group: how a model answers prompts, for a data set or a task."""

from __future__ import annotations

from pydantic import Field

from kdjax.config.group import group


@group
class GenerateConfig:
    out: str | None = None
    """JSON lines file that `kdjax.generate` writes; none means generated.jsonl in the output folder."""
    samples: int = Field(1, ge=1)
    """Answers to each prompt."""
    temperature: float | None = Field(None, ge=0)
    """Of sampling; 0 is greedy. None is 1 when a data set is written and 0 when a task is evaluated."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely ids that together reach this probability."""
    top_k: int = Field(0, ge=0)
    """Sample from so many most likely ids; 0 from all."""
    max_new_tokens: int = Field(256, ge=1)
    """Tokens of an answer at most."""
    prompt_max_len: int | None = Field(None, ge=1)
    """Longer prompts are left out and counted; none: what the model's positions leave beside the answer."""
    seed: int = Field(0, ge=0)
    """Of sampling. It decides the answers of plain transformers; SGLang's also depend on what shares a batch."""
    batch_size: int = Field(256, ge=1)
    """Prompts that the engine has at a time; what is answered is saved after each such batch."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds that one batch may take."""
    keep_unfinished: bool = False
    """Keep answers that were cut at max_new_tokens."""
    min_tokens: int = Field(1, ge=1)
    """Shorter answers are dropped."""
    max_tokens: int | None = Field(None, ge=1)
    """Longer answers are dropped."""
    judge: str | None = None
    """Registered reward, or `path/my.py:function`, that every answer gets."""
    min_reward: float = 1.0
    """With a judge: answers that it gives less are dropped."""
