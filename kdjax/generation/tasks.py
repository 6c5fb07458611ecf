"""How often is a model right? It answers the held-out prompts, and a registered reward scores every answer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdjax.config import Config
from kdjax.disk import whole
from kdjax.errors import UserError
from kdjax.generation.answers import Answers
from kdjax.generation.rewards import find_reward, with_answer
from kdjax.progress import Display


def evaluate_task(
    config: Config, model: str | Path, task: str, out: str | Path | None = None, display: Display | None = None
) -> dict[str, Any]:
    """Have ``model`` answer ``data.eval``, greedily unless ``generate.temperature`` says otherwise, and score it.

    Args:
        task: a registered reward, or ``path/my.py:function``.
        out: JSON lines with every answer; by default ``answers/TASK-MODEL.jsonl`` in the output folder. A journal
            beside it lets an interrupted evaluation go on; answers of another model or setting are replaced.

    Returns ``accuracy`` (``reward`` where rewards are not all 0 or 1), its ``standard_error`` over prompts (None for a
    single one), and counts. With ``generate.samples`` above 1 a prompt counts with the mean over its answers.
    """
    find_reward(task)
    if not config.data.eval:
        raise UserError("data.eval is empty: name the held-out rows, as in data.eval=[{path: rows.jsonl}]")
    name = f"{task.rpartition(':')[2]}-{Path(model).name}"
    out = Path(out or f"{config.output}/answers/{name}.jsonl")
    with Answers(
        config,
        str(model),
        config.data.eval,
        out.with_name(f"{out.stem}.journal.jsonl"),
        temperature=0.0,
        reward=task,
        as_teacher=False,
        replace=True,
    ) as answers:
        answers.write(display or Display(), out.with_name(f"{out.stem}.engine.log"))
        return _score(answers, task, out) | {"task": task, "model": str(model), "answers_file": str(out)}


def _score(answers: Answers, task: str, out: Path) -> dict[str, Any]:
    rewards: list[list[float]] = []
    left_out: Counter[str] = Counter()
    unfinished = tokens = 0
    with whole(out) as file:
        for prompt, entry in answers:
            if prompt is None:
                left_out[entry] += 1
                continue
            truth = with_answer(prompt).get("answer")
            for answer in entry:
                row = {"prompt": prompt.text, "response": answer.text, "answer": truth, "reward": answer.reward}
                row |= {"finish_reason": answer.finish_reason, "tokens": answer.tokens, "source": prompt.source}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                unfinished += answer.finish_reason == "length"
                tokens += answer.tokens
            rewards.append([answer.reward for answer in entry])
        if not rewards:  # raised here, so that an earlier file stays
            raise UserError(f"task {task}: no prompt could be asked ({dict(left_out)}); see data.eval")
    each = [mean(values) for values in rewards]
    total = sum(map(len, rewards))
    binary = all(value in (0.0, 1.0) for values in rewards for value in values)
    return {
        "accuracy" if binary else "reward": mean(each),
        "standard_error": stdev(each) / len(each) ** 0.5 if len(each) > 1 else None,
        "prompts": len(each),
        "left_out": dict(left_out),
        "answers": total,
        "unfinished": unfinished / total,
        "tokens_per_answer": tokens / total,
    }
