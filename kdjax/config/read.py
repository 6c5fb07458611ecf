"""From YAML and dotted overrides to a checked configuration and back; every fault is one line that names the key."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from kdjax.config.groups import Config
from kdjax.errors import UserError, first_line


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides (dotted keys, YAML values) and check everything.

    Raises UserError with the key, what is wrong and what would be right.
    """
    values: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: write key=value, as in train.steps=100")
        try:
            _assign(values, key.strip().removeprefix("--").split("."), yaml.load(text, Loader=_Loader), override)
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: the value is not YAML ({first_line(error)})") from None
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Check plain nested values and freeze them. Raises UserError on the first fault, named by its dotted key."""
    groups = {name for name, info in Config.__pydantic_fields__.items() if _group_of(info.annotation)}
    # A group with everything below it commented out is there with its defaults.
    values = {key: {} if value is None and key in groups else value for key, value in values.items()}
    _refuse_unknown(Config, values, "")
    try:
        return pydantic.TypeAdapter(Config).validate_python(values)
    except pydantic.ValidationError as error:
        raise UserError(_explain(error)) from None


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values, ready for YAML or JSON."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def reference(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Every key as ``(dotted name, type, default, meaning)``; list-valued groups are shown with ``[]``."""
    for name, info in cls.__pydantic_fields__.items():
        inner = _group_of(info.annotation)
        if inner is not None:
            many = inner is not info.annotation
            if many:
                yield f"{prefix}{name}", "list", [], info.description or ""
            yield from reference(inner, f"{prefix}{name}{'[]' if many else ''}.")
        else:
            default = "required" if info.is_required() else info.get_default(call_default_factory=True)
            yield f"{prefix}{name}", _type_name(info.annotation), default, info.description or ""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as a string; learning rates are written that way, so read it as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuses a key that comes twice, of which YAML would drop the first with all below it."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({first_line(error)})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or first_line(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of groups such as `train:`, found {type(values).__name__}")
    return values


def _assign(values: dict, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if isinstance(values, list):
            values = values[_index(key, values, override)]
        else:
            if values.get(key) is None:  # a group of which nothing is set, or all is commented out
                values[key] = {}
            values = values[key]
        if not isinstance(values, (dict, list)):
            raise UserError(f"override {override!r}: {key!r} is not a group")
    values[_index(keys[-1], values, override) if isinstance(values, list) else keys[-1]] = value


def _index(key: str, values: list, override: str) -> int:
    if not key.isdigit() or int(key) >= len(values):
        raise UserError(f"override {override!r}: {key!r} must be a place in a list of {len(values)}, counted from 0")
    return int(key)


def _refuse_unknown(cls: type, values: Any, prefix: str) -> None:
    if not isinstance(values, Mapping):
        return
    fields = cls.__pydantic_fields__
    for key, value in values.items():
        if key not in fields:
            near = [f"{prefix}{name}" for name in difflib.get_close_matches(str(key), list(fields), n=1)]
            if not near:
                leaves = {name.rpartition(".")[2]: name for name, *_ in reference()}
                near = [leaves[k] for k in difflib.get_close_matches(str(key), list(leaves), n=1, cutoff=0.8)]
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(fields)}"
            raise UserError(f"unknown key {prefix}{key!s}; {hint}")
        inner = _group_of(fields[key].annotation)
        items = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
        for i, item in items if inner else ():
            _refuse_unknown(inner, item, f"{prefix}{key}." if i is None else f"{prefix}{key}.{i}.")


def _group_of(annotation: Any) -> type | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _type_name(annotation: Any) -> str:
    if getattr(annotation, "__origin__", None) is Literal:
        return " | ".join(str(a) for a in annotation.__args__)
    return (
        annotation.__name__
        if isinstance(annotation, type) and not hasattr(annotation, "__args__")
        else str(annotation).replace("typing.", "")
    )


def _explain(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    if first["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: {message[0].lower()}{message[1:]}, got {first['input']!r}"
