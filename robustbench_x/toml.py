"""TOML read into pydantic models, with errors that name file, line and key; and written back."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

import pydantic

from robustbench_x.errors import ConfigError, near_matches

__all__ = ["Problem", "dump_toml", "first_problem", "parse_toml", "read_toml"]

ModelT = TypeVar("ModelT", bound=pydantic.BaseModel)
_TABLE = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")


def read_toml(path: Path, model: type[ModelT]) -> ModelT:
    """The file at `path` as a `model`.

    Raises:
        ConfigError: It cannot be read, is no TOML, or does not fit; names file, line and key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte-order mark
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; `rbx init` writes an audit.toml and a gate.toml") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text (byte {error.start}: {error.reason})") from error
    return parse_toml(text, model, name=str(path))


def parse_toml(text: str, model: type[ModelT], *, name: str) -> ModelT:
    """`text` as a `model`; `name` stands for the file in errors.

    Raises:
        ConfigError: It is no TOML or does not fit; names file, line and key.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}:{_syntax(str(error), text)}") from error
    try:
        return model.model_validate(raw)
    except pydantic.ValidationError as error:
        problem = first_problem(error, model)
        line = _line_of(text, problem.key)
        where = f"{name}:{line}" if line else name
        raise ConfigError(f"{where}: {problem}") from error


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with one key of a configuration; `str()` says it in one sentence."""

    key: tuple[str | int, ...]
    message: str
    unknown: bool = False

    def __str__(self) -> str:
        name = ".".join(str(part + 1 if isinstance(part, int) else part) for part in self.key)
        if self.unknown:
            return f"unknown key '{name}'; {self.message}"
        return f"key '{name}': {self.message}" if name else self.message


def first_problem(error: pydantic.ValidationError, model: type[pydantic.BaseModel]) -> Problem:
    """The first thing that a validation found: the key, what was given, what was expected.

    Where a key may be of several kinds, what each of them expected is joined.
    """
    problems = error.errors()
    first = problems[0]
    key = _key_of(model, first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, key[:-1])
        near = near_matches(str(key[-1]), known)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        return Problem(key=key, message=hint, unknown=True)
    same = [p for p in problems if _key_of(model, p["loc"]) == key]
    messages = dict.fromkeys(_plain_message(p) for p in same)
    shown = "" if first["type"] in ("missing", "value_error") else f" (got {first.get('input')!r})"
    return Problem(key=key, message=" or ".join(messages) + shown)


def _plain_message(problem: Mapping[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "model_type":
        return "must be a table, such as [[attack]]"
    return "missing" if problem["type"] == "missing" else message[0].lower() + message[1:]


def dump_toml(values: Mapping[str, Any]) -> str:
    """`values` as TOML: scalars and lists first, then tables and arrays of tables; None is left out."""
    lines: list[str] = []
    tables: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) or (_is_list(value) and value and all(isinstance(v, Mapping) for v in value)):
            tables.append((key, value))
        elif value is not None:
            lines.append(f"{_key(key)} = {_scalar(value)}")
    for key, value in tables:
        blocks = [(f"[{_key(key)}]", value)] if isinstance(value, Mapping) else [(f"[[{_key(key)}]]", v) for v in value]
        for header, block in blocks:
            body = [f"{_key(k)} = {_scalar(v)}" for k, v in block.items() if v is not None]
            lines += ["", header, *body]
    return "\n".join(lines).lstrip("\n") + "\n"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_scalar(v)}" for k, v in value.items() if v is not None) + " }"
    if _is_list(value):
        return "[" + ", ".join(_scalar(v) for v in value) + "]"
    return _quoted(str(value))


def _syntax(message: str, text: str) -> str:
    """tomllib's message as `N: key 'k': what`."""
    match = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", message)
    lines = text.splitlines()
    number = int(match[2]) if match else len(lines)
    what = match[1] if match else message.removesuffix(" (at end of document)")
    content = lines[number - 1] if 0 < number <= len(lines) else ""
    key = content.partition("=")[0].strip().strip("[]\"' ")
    named = f" key '{key}':" if key else ""
    return f"{number}:{named} not valid TOML, {what[0].lower() + what[1:]}"


def _line_of(text: str, path: Sequence[str | int]) -> int | None:
    """The 1-based line that sets the key at `path`, or the header of the table that should hold it."""
    wanted = [str(part) for part in path if isinstance(part, str)]
    indices = [part for part in path if isinstance(part, int)]
    if not wanted:
        return None
    table: list[str] = []
    seen: dict[str, int] = {}
    header_line = None
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _TABLE.match(line):
            table = [part.strip().strip("\"'") for part in match[2].split(".")]
            if match[1] == "[[":
                seen[match[2]] = seen.get(match[2], -1) + 1
            if table == wanted[: len(table)] and _right_entry(seen, match[2], indices):
                header_line = number
            continue
        key = line.partition("=")[0].strip().strip("\"'")
        full = [*table, *key.split(".")]
        if key and full == wanted[: len(full)] and _right_entry(seen, ".".join(table), indices):
            return number
    return header_line


def _right_entry(seen: Mapping[str, int], table: str, indices: Sequence[int]) -> bool:
    return table not in seen or not indices or seen[table] == indices[0]


def _fields_at(model: type[pydantic.BaseModel], path: Sequence[str | int]) -> list[str]:
    """Field names of the model nested at `path`."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        if field is None:
            return []
        nested = _models_in(field.annotation)
        if not nested:
            return []
        current = nested[0]
    return [f.alias or name for name, f in current.model_fields.items()]


def _key_of(model: type[pydantic.BaseModel], location: Sequence[str | int]) -> tuple[str | int, ...]:
    """The part of a pydantic location that the user wrote: without the names of a union's members."""
    for end, part in enumerate(location):
        if isinstance(part, str) and end and part not in _fields_at(model, location[:end]):
            known = _fields_at(model, location[:end])
            if not known and not _is_mapping_at(model, location[:end]):
                return tuple(location[:end])
    return tuple(location)


def _is_mapping_at(model: type[pydantic.BaseModel], path: Sequence[str | int]) -> bool:
    current: Any = model
    for part in path[:-1]:
        if isinstance(part, str):
            nested = _models_in(current.model_fields[part].annotation)
            current = nested[0] if nested else current
    field = current.model_fields.get(path[-1]) if isinstance(path[-1], str) else None
    return field is not None and any(a is dict or get_origin(a) is dict for a in _walk_args(field.annotation))


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    return [a for a in _walk_args(annotation) if isinstance(a, type) and issubclass(a, pydantic.BaseModel)]


def _walk_args(annotation: Any) -> list[Any]:
    found = [annotation]
    for arg in getattr(annotation, "__args__", ()):
        found += _walk_args(arg)
    return found
