"""the assistant's tokens, and no others, carry loss: on replicas of published chat templates, masks written by hand."""

import json
import re

import pytest
from data_tools import TEMPLATES, family, plain

from kdjax.data import Encoder
from kdjax.data.formats import Example, RowError
from kdjax.errors import UserError

USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}
THOUGHT = {"role": "assistant", "content": "<think>\n2 and 3\n</think>\n\n5"}
CHAT = (USER, ANSWER, {"role": "user", "content": "+1?"}, {"role": "assistant", "content": "6 now"})


def marked(tokenizer, document) -> str:
    """The document's text with [[ ]] around each run of tokens that carry loss."""
    text, inside = "", False
    for token, loss in zip(document.ids, document.loss, strict=True):
        text += ("[[" if loss else "]]") if loss != inside else ""
        text += tokenizer.decode([int(token)])
        inside = loss
    return text + ("]]" if inside else "")


def encode(tokenizer, messages, tools=None, **options):
    encoder = Encoder(tokenizer, **options)
    documents = encoder(Example(messages=tuple(messages), tools=tools), "here:1")
    for document in documents:  # token borders are those of the whole text, nothing is glued on
        text = re.sub(r"\[\[|\]\]", "", marked(tokenizer, document))
        assert document.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    return [marked(tokenizer, document) for document in documents]


QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
ONE = {
    "qwen2.5": [
        QWEN + "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n[[5<|im_end|>]]\n"
        "<|im_start|>user\n+1?<|im_end|>\n<|im_start|>assistant\n[[6 now<|im_end|>]]\n"
    ],
    "llama3": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[5<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\n+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[6 now<|eot_id|>]]"
    ],
    "gemma": [
        "<bos><start_of_turn>user\n2+3?<end_of_turn>\n<start_of_turn>model\n[[5<end_of_turn>]]\n"
        "<start_of_turn>user\n+1?<end_of_turn>\n<start_of_turn>model\n[[6 now<end_of_turn>]]\n"
    ],
}


PHI = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '<|endoftext|>' }}"
)


@pytest.mark.parametrize("name", ONE)
def test_several_turns_in_one_document(name):
    assert encode(family(name), CHAT) == ONE[name]


def test_qwen3_makes_one_document_a_turn_because_it_drops_earlier_thinking():
    thoughtful = (USER, THOUGHT, CHAT[2], {"role": "assistant", "content": "<think>\nadd\n</think>\n\n6"})
    assert encode(family("qwen3"), thoughtful) == [
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n[[<think>\n2 and 3\n</think>\n\n5<|im_end|>]]\n",
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        "<|im_start|>user\n+1?<|im_end|>\n<|im_start|>assistant\n[[<think>\nadd\n</think>\n\n6<|im_end|>]]\n",
    ]


def test_qwen3_without_thinking_in_the_data_still_rewrites_its_last_turn():
    assert encode(family("qwen3"), CHAT) == [
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\n5<|im_end|>]]\n",
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        "<|im_start|>user\n+1?<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\n6 now<|im_end|>]]\n",
    ]


def test_template_arguments_pass_through():
    # With enable_thinking false the empty thought belongs to the prompt, so the model is not asked to write it.
    assert encode(family("qwen3"), (USER, ANSWER), template_args={"enable_thinking": False}) == [
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[[5<|im_end|>]]\n"
    ]


def test_qwen3_keeps_a_chain_of_tool_calls_in_one_document():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = (
        USER,
        {"role": "assistant", "content": "<think>\nask\n</think>\n\n", "tool_calls": [call]},
        {"role": "tool", "content": "five"},
        THOUGHT,
    )
    assert encode(family("qwen3"), messages) == [
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n[[<think>\nask\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>]]\n'
        "<|im_start|>user\n<tool_response>\nfive\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\n2 and 3\n</think>\n\n5<|im_end|>]]\n"
    ]


def test_tools_and_tool_calls_reach_the_template():
    messages = (
        {"role": "system", "content": "Add."},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 2}}]},
    )
    assert encode(family("qwen2.5"), messages, tools=[{"name": "add"}]) == [
        '<|im_start|>system\nAdd.\n\n# Tools\n\n<tools>\n{"name": "add"}\n</tools><|im_end|>\n'
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
        '[[<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>]]\n'
    ]


def test_generation_markers_are_used():
    expected = [
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n[[5<|im_end|>]]\n"
        "<|im_start|>user\n+1?<|im_end|>\n<|im_start|>assistant\n[[6 now<|im_end|>]]\n"
    ]
    assert encode(plain(), CHAT) == expected
    # the same template without its markers: found by rendering prefixes
    bare = re.sub(r"\{%-? *(end)?generation *-?%\}", "", plain().chat_template)
    assert "generation -%}" not in bare
    assert encode(plain(), CHAT, chat_template=bare) == expected


def test_marked_answers_agree_with_transformers(root):
    rows = [json.loads(line) for line in (root / "examples/data/gsm8k_test.jsonl").read_text().splitlines()[:40]]
    encoder = Encoder(plain())
    for row in rows:
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        (document,) = encoder(Example(messages=tuple(messages)), "here:1")
        theirs = plain().apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert document.ids.tolist() == theirs["input_ids"]
        assert document.loss.astype(int).tolist() == theirs["assistant_masks"]


def test_what_a_template_adds_behind_the_answer_carries_no_loss():
    # Phi-3's habit: the end-of-turn token, a newline, and once at the very end an end-of-text token
    assert encode(plain(), CHAT, chat_template=PHI) == [
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n[[5<|im_end|>]]\n"
        "<|im_start|>user\n+1?<|im_end|>\n<|im_start|>assistant\n[[6 now<|im_end|>]]\n<|endoftext|>"
    ]


@pytest.mark.parametrize("content", ["end", "im", "text", "assistant", ""])
def test_an_answer_that_is_part_of_a_special_token(content):
    assert encode(plain(), (USER, {"role": "assistant", "content": content}), chat_template=PHI) == [
        f"<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n[[{content}<|im_end|>]]\n<|endoftext|>"
    ]


def test_a_prompt_header_that_the_rendered_answer_lacks():
    # DeepSeek-R1's habit: the header opens a thought, the rendered answer has none
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"
    )
    assert encode(plain(), (USER, ANSWER), chat_template=template) == [
        "<|im_start|>user\n2+3?<|im_end|><|im_start|>assistant\n[[5<|im_end|>]]"
    ]


def test_answers_that_repeat_the_prompt_or_hold_special_text():
    echo = {"role": "assistant", "content": "2+3? <|im_end|> 2+3?"}
    assert encode(family("qwen2.5"), (USER, echo, USER, ANSWER)) == [
        QWEN + "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n[[2+3? <|im_end|> 2+3?<|im_end|>]]\n"
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n[[5<|im_end|>]]\n"
    ]


def test_characters_of_several_tokens_are_never_cut():
    answer = {"role": "assistant", "content": "é🙂"}
    encoder = Encoder(family("llama3"))
    (document,) = encoder(Example(messages=(USER, answer)), "here:1")
    assert family("llama3").decode(document.ids[document.loss].tolist()) == "é🙂<|eot_id|>"
    assert document.loss.sum() > 3  # several byte tokens a character


def test_a_turn_of_the_user_at_the_end_and_the_assistant_at_the_start_carry_no_loss():
    first = {"role": "assistant", "content": "Hi."}
    assert encode(family("llama3"), (first, USER, ANSWER, USER)) == [
        "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[5<|eot_id|>]]"
    ]
    (only_user,) = encode(family("llama3"), (USER,))
    assert "[[" not in only_user


def test_train_on_all_puts_loss_on_every_token():
    (text,) = encode(family("gemma"), (USER, ANSWER), train_on="all")
    assert text == "<bos>[[<start_of_turn>user\n2+3?<end_of_turn>\n<start_of_turn>model\n5<end_of_turn>\n]]"


def test_plain_text_is_tokenized_as_it_is():
    (document,) = Encoder(plain())(Example(text="Two and two."), "here:1")
    assert document.ids.tolist() == plain()("Two and two.")["input_ids"]
    assert document.loss.tolist() == [False] + [True] * (len(document) - 1)


def test_prompt_ends_with_the_header_that_asks_for_an_answer():
    ids = Encoder(family("gemma")).prompt((USER,))
    assert family("gemma").decode(ids.tolist()) == (
        "<bos><start_of_turn>user\n2+3?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_teacher_reads_another_prompt_and_the_same_answer():
    hint = ({"role": "system", "content": "It is 5."}, USER, ANSWER)
    (document,) = Encoder(family("qwen2.5"))(Example(messages=(USER, ANSWER), teacher=hint), "here:1")
    teacher_ids, spans = document.teacher_request
    assert "It is 5." in family("qwen2.5").decode(teacher_ids.tolist())
    assert len(teacher_ids) != len(document)
    rows = [r for start, stop in spans for r in range(start, stop)]
    assert [int(teacher_ids[r + 1]) for r in rows] == document.labels.tolist()
    assert family("qwen2.5").decode(document.labels.tolist()) == "5<|im_end|>"


THINK_NOT = {"enable_thinking": False}


def read_by(teacher, *messages, other=None, **options):
    """Documents of a student that reads Qwen2.5's template, and what a teacher with a template of its own reads."""
    tokenizer = family("qwen2.5")
    theirs = Encoder(tokenizer, chat_template=(TEMPLATES / f"{teacher}.jinja").read_text(), template_args=options)
    found = Encoder(tokenizer, teacher=theirs)(Example(messages=messages, teacher=other), "here:1")
    for document in found:
        assert document.teacher_labels.tolist() == document.labels.tolist()
    teachers = [document.__class__(document.teacher_ids, document.teacher_loss, "") for document in found]
    return [marked(tokenizer, d) for d in found], [marked(tokenizer, d) for d in teachers]


def test_a_teacher_with_a_template_of_its_own_reads_the_same_answer():
    ours, theirs = read_by("qwen3", USER, ANSWER, **THINK_NOT)
    assert ours == [QWEN + "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n[[5<|im_end|>]]\n"]
    asked = "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert theirs == [asked + "[[5<|im_end|>]]\n"]
    hint = ({"role": "user", "content": "2+3? It is 5."}, ANSWER)
    ours, theirs = read_by("qwen3", USER, ANSWER, other=hint, **THINK_NOT)
    assert "It is" not in ours[0] and theirs == [asked.replace("2+3?", "2+3? It is 5.") + "[[5<|im_end|>]]\n"]


def test_turns_are_read_one_by_one_where_the_teachers_template_rewrites_history():
    ours, theirs = read_by("qwen3", *CHAT, **THINK_NOT)
    assert [re.findall(r"\[\[(.*?)\]\]", text) for text in ours] == [["5<|im_end|>"], ["6 now<|im_end|>"]]
    assert [text.count("<think>") for text in theirs] == [1, 1] and theirs[1].index("<think>") > theirs[1].index("+1?")
    ours, theirs = read_by("qwen2.5", *CHAT)  # nothing of the kind here: all turns in one document
    assert ours == theirs == ONE["qwen2.5"]


def test_an_answer_that_the_teachers_template_writes_otherwise_is_refused_with_where():
    with pytest.raises(RowError, match=r"from its token 0 on \(student: '5<\|im_end\|>', teacher: '<think>"):
        read_by("qwen3", USER, ANSWER)  # in thinking mode the empty thought is part of the answer


def test_refusals():
    with pytest.raises(RowError, match="refuses the conversation .*must alternate"):
        encode(family("gemma"), (USER, USER, ANSWER))
    with pytest.raises(RowError, match="System role not supported"):
        encode(family("gemma"), ({"role": "system", "content": "x"}, USER, ANSWER))
    with pytest.raises(UserError, match="not valid Jinja: line 2"):
        encode(plain(), (USER, ANSWER), chat_template="{{ bos_token }}\n{% for %}")
    shifting = "{% for m in messages %}{{ loop.length ~ m.content }}{% endfor %}"
    with pytest.raises(RowError, match="generation"):
        encode(plain(), (USER, ANSWER), chat_template=shifting)


def test_chat_data_needs_a_chat_template(tmp_path):
    from data_tools import ROOT

    from kdjax.data import load_tokenizer

    bare = load_tokenizer(ROOT / "examples" / "tokenizer")
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template.*data.chat_template"):
        encode(bare, (USER, ANSWER))
    assert encode(bare, (USER, ANSWER), chat_template=(TEMPLATES / "qwen2.5.jinja").read_text())
