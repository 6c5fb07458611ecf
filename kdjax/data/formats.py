"""What a row says: chat messages, ShareGPT, Alpaca, prompt and response, a prompt alone, or plain text, as one form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdjax.errors import UserError

Message = dict[str, Any]
Row = Mapping[str, Any]

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip


class RowError(ValueError):
    """This row cannot be used, and why. The stream adds file and line, then stops or skips as configured."""


@dataclass(frozen=True)
class Example:
    """A conversation, or a plain text. ``teacher`` is the conversation as the teacher sees it, if that differs; then
    only the last assistant turn, which both share, carries loss."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: list[Any] | None = None
    teacher: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one format. The names are columns of the file."""

    format: str
    messages_key: str = "messages"
    prompt_key: str = "prompt"
    response_key: str = "response"
    text_key: str = "text"
    teacher_input_key: str | None = None
    teacher_prompt: str | None = None
    system: str | None = None

    def __call__(self, row: Row) -> Example:
        """Raises RowError with the reason when the row does not have the form."""
        if self.format == "text":
            if self.teacher_input_key is not None or self.teacher_prompt is not None:
                raise RowError("a prompt of the teacher's own needs a conversation, not plain text")
            return Example(text=_text(row, self.text_key))
        messages = {
            "chat": self._chat, "sharegpt": self._chat, "alpaca": self._alpaca, "prompt_response": self._pair,
            "prompt": self._prompt,
        }[self.format](row)  # fmt: skip
        teacher = None
        if self.teacher_input_key is not None or self.teacher_prompt is not None:
            answer = messages[-1:] if messages[-1]["role"] == "assistant" else ()
            teacher = self._with_system((*self._teachers(row), *answer))
        tools = row.get("tools") or None
        tools = _from_json(tools) if isinstance(tools, str) else tools
        if tools is not None and not isinstance(tools, list):
            raise RowError(f"column 'tools' holds {_kind(tools)}, expected a list of tool descriptions")
        return Example(messages=self._with_system(messages), tools=tools or None, teacher=teacher)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return ({"role": "system", "content": self.system}, *messages)

    def _chat(self, row: Row) -> tuple[Message, ...]:
        return _messages(_column(row, self.messages_key), self.messages_key, string=False)

    def _pair(self, row: Row) -> tuple[Message, ...]:
        prompt = _messages(_column(row, self.prompt_key), self.prompt_key)
        answer = _column(row, self.response_key)
        if isinstance(answer, str):
            return (*prompt, {"role": "assistant", "content": answer})
        return (*prompt, *_messages(answer, self.response_key, string=False))

    def _prompt(self, row: Row) -> tuple[Message, ...]:
        return _messages(_column(row, self.prompt_key), self.prompt_key)

    def _teachers(self, row: Row) -> tuple[Message, ...]:
        """The prompt that the teacher alone sees."""
        if self.teacher_prompt is None:
            return _messages(_column(row, self.teacher_input_key), self.teacher_input_key)
        try:
            return ({"role": "user", "content": self.teacher_prompt.format_map(row)},)
        except KeyError as error:
            raise RowError(
                f"teacher_prompt names the column {error}; the columns are {', '.join(map(str, row))}"
            ) from None
        except (ValueError, IndexError, AttributeError) as error:
            raise RowError(f"teacher_prompt: {error}; write braces that mean themselves twice, as {{{{") from None

    def _alpaca(self, row: Row) -> tuple[Message, ...]:
        prompt, extra = _text(row, "instruction"), row.get("input") or ""
        if not isinstance(extra, str):
            raise RowError(f"column 'input' holds {_kind(extra)}, expected text")
        turns: list[Message] = []
        if row.get("system"):
            turns.append({"role": "system", "content": _text(row, "system")})
        for pair in row.get("history") or ():
            if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
                raise RowError("column 'history' holds something other than [question, answer] pairs")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        turns.append({"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt})
        turns.append({"role": "assistant", "content": _text(row, "output")})
        return tuple(turns)


def choose_reader(config: Any, columns: Sequence[str], where: str, *, system: str | None = None) -> RowReader:
    """The reader for a source (``format`` and the ``*_key`` fields of ``config``) whose rows have these columns.

    Raises UserError, listing the columns, when the named ones are not there or ``auto`` finds no known form.
    """
    keys = {name: getattr(config, name) for name in ("messages_key", "prompt_key", "response_key", "text_key")}
    if keys["messages_key"] not in columns and "conversations" in columns:
        keys["messages_key"] = "conversations"
    needs = {
        "chat": (keys["messages_key"],),
        "sharegpt": (keys["messages_key"],),
        "prompt_response": (keys["prompt_key"], keys["response_key"]),
        "alpaca": ("instruction", "output"),
        "text": (keys["text_key"],),
        "prompt": (keys["prompt_key"],),
    }
    chosen, found = config.format, ", ".join(map(str, columns)) or "none"
    if chosen == "auto":
        chosen = next((name for name, columns_ in needs.items() if all(c in columns for c in columns_)), None)
        if chosen is None:
            raise UserError(
                f"{where}: no known row format among the columns ({found}); set format and messages_key, "
                f"prompt_key with response_key, or text_key to the columns to use"
            )
    wanted = needs[chosen] if config.teacher_input_key is None else (*needs[chosen], config.teacher_input_key)
    missing = [c for c in wanted if c not in columns]
    if missing:
        raise UserError(
            f"{where}: no column {missing[0]!r} for format {chosen!r}; the columns are {found}: name the right one"
        )
    teachers = {name: getattr(config, name) for name in ("teacher_input_key", "teacher_prompt")}
    return RowReader(chosen, **keys, **teachers, system=system)


def _column(row: Row, key: str) -> Any:
    if key not in row:
        raise RowError(f"no column {key!r}; the columns are {', '.join(map(str, row)) or 'none'}")
    if row[key] is None:
        raise RowError(f"column {key!r} is empty (null)")
    return row[key]


def _text(row: Row, key: str) -> str:
    value = _column(row, key)
    if not isinstance(value, str):
        raise RowError(f"column {key!r} holds {_kind(value)}, expected text")
    return value


def _messages(value: Any, key: str, *, string: bool = True) -> tuple[Message, ...]:
    """Messages from a list of {role, content} or {from, value}, or its JSON; with ``string``, a text is one user's."""
    if string and isinstance(value, str):
        return ({"role": "user", "content": value},)
    if isinstance(value, str):  # a CSV file has no lists: they stand in it as JSON
        value = _from_json(value)
    if not isinstance(value, list) or not value:
        wanted = "text or a list of messages" if string else "a list of messages"
        raise RowError(f"column {key!r} holds {_kind(value)}, expected {wanted}")
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise RowError(f"column {key!r}: message {i} is {_kind(item)}, expected {{role, content}}")
        if "role" in item:
            # a table's columns give every message every key: those without a value were never there
            message = {k: v for k, v in item.items() if v is not None or k == "content"}
        elif "from" in item:
            speaker = item["from"]
            if speaker not in SPEAKERS:
                raise RowError(f"column {key!r}: message {i} is from {speaker!r}, known are {', '.join(SPEAKERS)}")
            message = {"role": SPEAKERS[speaker], "content": item.get("value")}
        else:
            raise RowError(f"column {key!r}: message {i} has neither role nor from, only {', '.join(map(str, item))}")
        if not isinstance(message["role"], str):
            raise RowError(f"column {key!r}: message {i} has {_kind(message['role'])} for a role, expected text")
        content = message.setdefault("content", None)
        if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
            raise RowError(f"column {key!r}: message {i} has {_kind(content)} for content, expected text")
        messages.append(message)
    return tuple(messages)


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    if value is None:
        return "nothing"
    if isinstance(value, (list, str)) and not value:
        return f"an empty {'list' if isinstance(value, list) else 'text'}"
    return names.get(type(value), type(value).__name__)
