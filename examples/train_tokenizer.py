"""train the small tokenizer of the examples: byte-level BPE, 4,096 entries, learnt from GSM8K's training rows.

    python examples/train_tokenizer.py                      # writes examples/tokenizer/

The result is an ordinary Hugging Face tokenizer folder. Digits are split one by one, so that numbers are spelt the same
way wherever they stand; the chat template marks what the assistant says, so loss masks need no guessing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train(files: list[Path], size: int) -> PreTrainedTokenizerFast:
    """learn `size` entries (specials included) from every string value of the json lines in `files`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte has a token: no text is unknown
        show_progress=False,
    )
    rows = (json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines())
    tokenizer.train_from_iterator((text for row in rows for text in row.values() if isinstance(text, str)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", default=[HERE / "data" / "gsm8k_train.jsonl"])
    parser.add_argument("--size", type=int, default=4096, help="entries, specials included (default 4096)")
    parser.add_argument("--out", type=Path, default=HERE / "tokenizer")
    arguments = parser.parse_args()
    tokenizer = train(arguments.files, arguments.size)
    tokenizer.save_pretrained(arguments.out)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one
    path = arguments.out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    print(f"{len(tokenizer):,} entries written to {arguments.out}")


if __name__ == "__main__":
    main()
