"""Conversation → token ids and the mask of the assistant's tokens, exactly as the model's own chat template renders it.

The rendered text is tokenized once, as a whole, so token borders are those of ``tokenizer(text)``; nothing is glued on.
Characters are then mapped to tokens by offsets: a token belongs to the stretch of text in which it begins.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import numpy as np
from jaxtyping import Bool, Int32

from kdjax.data.batch import Document
from kdjax.data.formats import Example, Message, RowError
from kdjax.errors import UserError

Stretch = tuple[int, int]  # half-open range of characters
Tokens = tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]  # ids, and which of them carry loss

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_one_at_a_time = threading.Lock()  # transformers tracks {% generation %} in state that all renderings share


@dataclass(frozen=True)
class _Text:
    text: str
    loss: tuple[Stretch, ...]


class Encoder:
    """Turns examples into documents with one tokenizer and one chat template.

    Args:
      tokenizer: a fast transformers tokenizer.
      chat_template: Jinja text that replaces the tokenizer's own template.
      template_args: further variables of the template, as in ``{"enable_thinking": False}``.
      train_on: ``"assistant"``: what the assistant says and the token that ends its turn carry loss, nothing else;
        ``"all"``: every token of the conversation does. Plain text always carries loss everywhere.
      teacher: how the teacher reads the same conversations, where that is otherwise.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        train_on: Literal["assistant", "all"] = "assistant",
        teacher: Encoder | None = None,
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError("tokenizer: a fast tokenizer (tokenizer.json) is needed to know which text a token covers")
        self.tokenizer = tokenizer
        self.train_on, self.teacher = train_on, teacher
        self._chat_template = chat_template
        self._args = {**tokenizer.special_tokens_map, **(template_args or {})}
        # The plain tokenizers object: encoding with it only reads, so threads can share it.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        specials = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        names = sorted(specials | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def __call__(self, example: Example, source: str) -> list[Document]:
        """The documents of one example: one, or one for each stretch of turns where the template rewrites history.

        A document may be without loss tokens. Raises RowError when the template refuses the conversation or teacher and
        student would not train on the same tokens, UserError when there is no usable template.
        """
        if example.text is not None:
            encoding = self._backend.encode(example.text)
            ids = np.asarray(encoding.ids, np.int32)
            if not ids.size:
                raise RowError("the text is empty")
            return [Document(ids, np.arange(len(ids)) > 0, source)]
        if example.teacher is None and self.teacher is None:
            return [Document(*ours, source) for ours in self._turns(example.messages, example.tools)]
        reader = self.teacher or self
        if example.teacher is not None:
            ours = [self.last_turn(example.messages, example.tools)]
            theirs = [reader.last_turn(example.teacher, example.tools)]
        else:
            ours, theirs = (encoder._turns(example.messages, example.tools) for encoder in (self, reader))
            if [loss.sum() for _, loss in ours] != [loss.sum() for _, loss in theirs]:  # one rewrites history
                parts = [example.messages[: k + 1] for k in _answers(example.messages)]
                ours, theirs = ([e.last_turn(part, example.tools) for part in parts] for e in (self, reader))
        for (ids, loss), (teacher_ids, teacher_loss) in zip(ours, theirs, strict=True):
            self._compare(ids[loss], teacher_ids[teacher_loss])
        return [Document(*mine, source, *its) for mine, its in zip(ours, theirs, strict=True)]

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Int32[np.ndarray, " T"]:
        """Ids of the conversation so far with the header that asks the assistant to speak."""
        text, _ = self._render(messages, tools, add_generation_prompt=True)
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def last_turn(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Tokens:
        """Ids and mask of the conversation, with loss on the assistant's last turn alone.

        Raises RowError where there is none.
        """
        last = self._texts(messages, tools)[-1]
        if not last.loss:
            raise RowError("the chat template shows no assistant turn")
        return self._tokenize(_Text(last.text, last.loss if self.train_on == "all" else last.loss[-1:]))

    def _turns(self, messages: Sequence[Message], tools: list[Any] | None) -> list[Tokens]:
        """Ids and mask of each document, with loss on every turn of the assistant."""
        return [self._tokenize(text) for text in self._texts(messages, tools)]

    def _compare(self, ours: Int32[np.ndarray, " R"], theirs: Int32[np.ndarray, " U"]) -> None:
        """Raise RowError, with where they part, unless student and teacher read the same response."""
        if not np.array_equal(ours, theirs):
            at = len(os.path.commonprefix([ours.tolist(), theirs.tolist()]))
            ours, theirs = (self.tokenizer.decode(ids[at : at + 8]) for ids in (ours, theirs))
            raise RowError(
                f"the response has other tokens behind the teacher's prompt than behind the student's, from its token "
                f"{at} on (student: {ours!r}, teacher: {theirs!r})"
            )

    def _texts(self, messages: Sequence[Message], tools: list[Any] | None) -> list[_Text]:
        if self.train_on == "all":
            text, _ = self._render(messages, tools)
            return [_Text(text, ((0, len(text)),))]
        template = self._template(tools)
        if _MARKED.search(template):
            text, stretches = self._render(messages, tools, marked=True)
            return [_Text(text, tuple(stretches))]
        texts: list[_Text] = []
        for k in _answers(messages):
            whole, stretch = self._turn(messages[: k + 1], tools)
            if texts and whole.startswith(texts[-1].text[: texts[-1].loss[-1][1]]):
                texts[-1] = _Text(whole, (*texts[-1].loss, stretch))
            else:  # the template shows earlier turns differently from here on (Qwen3 drops their thinking)
                texts.append(_Text(whole, (stretch,)))
        return texts or [_Text(self._render(messages, tools)[0], ())]

    def _turn(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[str, Stretch]:
        """The conversation up to and with an assistant turn, and the characters of that turn."""
        whole, _ = self._render(messages, tools)
        prompt, _ = self._render(messages[:-1], tools, add_generation_prompt=True)
        start = len(prompt)
        if not whole.startswith(prompt):
            # The header that asks for an answer can hold more than the rendered answer does (an opened <think>): the
            # turn then begins where the two part, but never inside what came before it.
            before, _ = self._render(messages[:-1], tools)
            start = len(os.path.commonprefix([whole, prompt]))
            if not whole.startswith(before) or start < len(before):
                raise RowError(
                    "the chat template renders the prompt differently once it is answered, so the answer cannot be "
                    "found; mark it with {% generation %} in data.chat_template"
                )
        return whole, (start, self._end_of_turn(whole, start, messages[-1]))

    def _end_of_turn(self, whole: str, start: int, message: Message) -> int:
        """Where the turn that begins at ``start`` ends: behind its end-of-turn token, before what the template adds."""
        content = message.get("content")
        if isinstance(content, str) and not message.get("tool_calls"):
            at = whole.find(content.strip(), start)
            if at >= 0 and (end := self._special.search(whole, at + len(content.strip()))):
                return end.end()
        ends = [match.end() for match in self._special.finditer(whole, start)]
        return ends[-1] if ends and not whole[ends[-1] :].strip() else len(whole)

    def _tokenize(self, text: _Text) -> Tokens:
        encoding = self._backend.encode(text.text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        if not ids.size:
            raise RowError("the chat template renders nothing")
        begin, end = np.asarray(encoding.offsets).T
        loss = np.zeros(len(ids), bool)
        for start, stop in text.loss:
            loss |= (begin >= start) & (begin < stop) & (end > begin)
        loss[0] = False
        return ids, loss

    def _template(self, tools: list[Any] | None) -> str:
        try:
            return self.tokenizer.get_chat_template(self._chat_template, tools)
        except ValueError:
            name = getattr(self.tokenizer, "name_or_path", "") or "the tokenizer"
            raise UserError(
                f"{name} has no chat template for these conversations; set data.chat_template to a Jinja file"
            ) from None

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, *, marked: bool = False, **flags: bool
    ) -> tuple[str, list[Stretch]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._template(tools)
        try:
            with _one_at_a_time:
                rendered, stretches = render_jinja_template(
                    conversations=[list(messages)],
                    tools=tools,
                    chat_template=template,
                    return_assistant_tokens_mask=marked,
                    **{"add_generation_prompt": False, **flags},
                    **self._args,
                )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is not valid Jinja: line {error.lineno}, {error.message}") from None
        except (jinja2.TemplateError, TypeError) as error:
            raise RowError(f"the chat template refuses the conversation ({error})") from None
        return rendered[0], [tuple(s) for s in stretches[0]] if marked else []


def _answers(messages: Sequence[Message]) -> list[int]:
    """Places of the assistant's turns, but for a first one: no prompt leads to it that a model would continue."""
    return [k for k, message in enumerate(messages) if k and message["role"] == "assistant"]
