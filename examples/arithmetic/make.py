"""make the arithmetic task: sums of four to seven numbers, worked out one addition at a time, and their tokenizer.

    python examples/arithmetic/make.py                    # rewrites train.jsonl, eval.jsonl and tokenizer/ beside it
    python examples/arithmetic/make.py --teacher 120000    # and runs/arithmetic/teacher.jsonl, to train the teacher on

    prompt    17+28+6+30
    response  17+28=45
              45+6=51
              51+30=81
              #### 81

Rows to learn from show how a slip is mended: now and then a line has a wrong result, and the next one does the same
addition again. Held-out rows have no slip. No prompt stands in two files. The seed decides everything, so the teacher's
own rows need not be shipped.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
TEACHER_ROWS = HERE.parent.parent / "runs" / "arithmetic" / "teacher.jsonl"
SLIPS, FEWER_SLIPS = 0.1, 0.05  # share of lines that go wrong, in the teacher's rows and in the students'

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
SPECIALS = [PAD, UNKNOWN, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHARACTERS = ["\n", *map(chr, range(ord(" "), ord("~") + 1))]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def solve(numbers: list[int], slips: random.Random | None = None, share: float = SLIPS) -> str:
    """every partial sum on a line of its own, then the answer behind ####; ``slips`` draws which lines go wrong"""
    lines, total = [], numbers[0]
    for number in numbers[1:]:
        while slips and slips.random() < share:
            lines.append(f"{total}+{number}={wrong(total + number, slips)}")
        lines.append(f"{total}+{number}={total + number}")
        total += number
    return "\n".join([*lines, f"#### {total}"])


def wrong(result: int, draw: random.Random) -> str:
    """the number with one of its digits replaced by another"""
    digits = list(str(result))
    place = draw.randrange(len(digits))
    digits[place] = draw.choice([digit for digit in "0123456789" if digit != digits[place]])
    return "".join(digits)


def row(numbers: list[int], slips: random.Random | None = None, share: float = SLIPS) -> dict[str, str]:
    return {"prompt": "+".join(map(str, numbers)), "response": solve(numbers, slips, share)}


def students_rows(numbers: Iterable[list[int]], seed: int) -> Iterator[dict[str, str]]:
    slips = random.Random(seed + 1)
    return (row(each, slips, FEWER_SLIPS) for each in numbers)


def problems(seed: int) -> Iterator[list[int]]:
    """distinct lists of numbers without end"""
    draw, seen = random.Random(seed), set()
    while True:
        numbers = [draw.randint(1, 30) for _ in range(draw.randint(4, 7))]
        if tuple(numbers) not in seen:
            seen.add(tuple(numbers))
            yield numbers


def tokenizer() -> PreTrainedTokenizerFast:
    """one token a character of printable ASCII; the chat template marks what the assistant says"""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *CHARACTERS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2000, help="rows that students learn from (default 2000)")
    parser.add_argument("--eval", type=int, default=1000, help="held-out rows (default 1000)")
    parser.add_argument("--teacher", type=int, default=0, help="rows that the teacher learns from, written to runs/")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    numbers, slips = problems(arguments.seed), random.Random(arguments.seed)
    write_rows(arguments.out / "eval.jsonl", map(row, islice(numbers, arguments.eval)))
    write_rows(arguments.out / "train.jsonl", students_rows(islice(numbers, arguments.train), arguments.seed))
    if arguments.teacher:
        write_rows(TEACHER_ROWS, (row(each, slips) for each in islice(numbers, arguments.teacher)))
    tokenizer().save_pretrained(arguments.out / "tokenizer")
    # transformers 5 writes a class name that transformers 4 does not know; both know this one
    path = arguments.out / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
