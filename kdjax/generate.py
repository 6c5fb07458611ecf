"""``python -m kdjax.generate --config run.yaml [key=value …]``: a teacher writes a data set for black-box distillation.

The prompts are those of ``data.train``. Every answer that passes the filters becomes a chat row that ``data.train``
reads. The command goes on where it was stopped, and filters can be changed afterwards: answers are kept in a journal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdjax.command import guarded
from kdjax.config import Config, GenerateConfig, load_config
from kdjax.data.prompts import Prompt
from kdjax.disk import whole, write_whole
from kdjax.errors import UserError
from kdjax.generation.answers import LEFT_OUT, Answer, Answers
from kdjax.generation.rewards import with_answer
from kdjax.progress import Display

DROPPED = {
    "unfinished": "cut at generate.max_new_tokens",
    "empty": "without text",
    "short": "shorter than generate.min_tokens",
    "long": "longer than generate.max_tokens",
    "rejected": "given less than generate.min_reward",
    "duplicate": "like an earlier answer to the same prompt",
}


def generate(config: Config, display: Display | None = None) -> dict[str, Any]:
    """Write ``generate.out`` and, beside it, a journal of all answers and a report, which is returned.

    The report counts prompts, answers, what was kept, what was left out and dropped and why, and tokens. Raises
    UserError where the configuration or the data can mend it, and when no answer was kept.
    """
    display = display or Display()
    if config.teacher.path is None:
        raise UserError("teacher.path is missing: the folder or hub id of the model that writes the answers")
    out = Path(config.generate.out or f"{config.output}/generated.jsonl")
    journal = out.with_name(f"{out.stem}.journal.jsonl")
    if out.exists() and not journal.exists() and not config.overwrite:
        raise UserError(f"{out} is there and was not written by this command; choose another generate.out")
    with Answers(
        config,
        config.teacher.path,
        config.data.train,
        journal,
        temperature=1.0,
        reward=config.generate.judge,
        as_teacher=True,
        replace=False,
    ) as answers:
        answers.write(display, out.with_name(f"{out.stem}.engine.log"))
        report = _assemble(answers, out, config.generate)
    report |= {"seconds": answers.seconds, "tokens_per_second": answers.tokens / max(answers.seconds, 1e-9)}
    write_whole(out.with_name(f"{out.stem}.report.json"), json.dumps(report, indent=1) + "\n")
    _show(report, out, display)
    return report


def why_dropped(answer: Answer, settings: GenerateConfig, earlier: set[str]) -> str | None:
    """The key in DROPPED for why an answer is not kept, or None. ``earlier`` are the texts kept for its prompt."""
    reasons = {
        "unfinished": answer.finish_reason == "length" and not settings.keep_unfinished,
        "empty": not answer.text.strip(),
        "short": answer.tokens < settings.min_tokens,
        "long": settings.max_tokens is not None and answer.tokens > settings.max_tokens,
        "rejected": answer.reward is not None and answer.reward < settings.min_reward,
        "duplicate": answer.text in earlier,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def chat_row(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """A row of a chat data set: the student's conversation with this answer, and where both come from."""
    row: dict[str, Any] = {"messages": [*prompt.messages, {"role": "assistant", "content": answer.text}]}
    if prompt.tools:
        row["tools"] = prompt.tools
    truth = with_answer(prompt).get("answer")
    row |= {} if truth is None else {"answer": truth}
    row |= {"source": prompt.source, "tokens": answer.tokens, "finish_reason": answer.finish_reason}
    return row if answer.reward is None else row | {"reward": answer.reward}


def _assemble(answers: Answers, out: Path, settings: GenerateConfig) -> dict[str, Any]:
    """Filter all answers into ``out``, which appears whole or not at all, and count."""
    left_out: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    prompts = asked = kept = tokens = covered = 0
    with whole(out, durable=True) as file:
        for prompt, entry in answers:
            prompts += 1
            if prompt is None:
                left_out[entry] += 1
                continue
            texts: set[str] = set()
            for answer in entry:
                asked += 1
                if reason := why_dropped(answer, settings, texts):
                    dropped[reason] += 1
                    continue
                texts.add(answer.text)
                tokens += answer.tokens
                file.write(json.dumps(chat_row(prompt, answer), ensure_ascii=False) + "\n")
            kept += len(texts)
            covered += bool(texts)
        report = {
            "prompts": prompts,
            "left_out": dict(left_out),
            "answers": asked,
            "kept": kept,
            "dropped": dict(dropped),
            "prompts_with_a_kept_answer": covered,
            "kept_tokens": tokens,
        }
        if not kept:
            raise UserError(f"{out} was not written, since no answer was kept: {_reasons(report)}")
    return report


def _reasons(report: dict[str, Any]) -> str:
    of_prompts = [f"{n} prompts {LEFT_OUT[why]}" for why, n in report["left_out"].items()]
    of_answers = [f"{n} answers {DROPPED[why]}" for why, n in report["dropped"].items()]
    return ", ".join([*of_prompts, *of_answers]) or "nothing was left out"


def _show(report: dict[str, Any], out: Path, display: Display) -> None:
    display.line(
        f"{report['kept']} of {report['answers']} answers to {report['prompts']} prompts kept; {_reasons(report)}"
    )
    if report["dropped"].get("unfinished", 0) > report["answers"] / 2:
        display.line(
            "warning: more than half of the answers were cut: raise generate.max_new_tokens, or check that the model "
            "ends its turn with its tokenizer's eos_token under this chat template"
        )
    display.line(f"written to {out}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kdjax.generate", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file as for training; the group `generate` is for this")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace single values")
    arguments = parser.parse_args(argv)

    def command() -> None:
        generate(load_config(arguments.config, arguments.overrides))

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
