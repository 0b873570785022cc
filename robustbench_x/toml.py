"""TOML read into pydantic models, with errors that name file, line and key; and written back."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from robustbench_x.errors import ConfigError, near_matches

__all__ = ["describe_problem", "dump_toml", "parse_toml", "read_toml"]

ModelT = TypeVar("ModelT", bound=pydantic.BaseModel)
_TABLE = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")


def read_toml(path: Path, model: type[ModelT]) -> ModelT:
    """The file at `path` as a `model`.

    Raises:
        ConfigError: It cannot be read, is no TOML, or does not fit; names file, line and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_toml(text, model, name=str(path))


def parse_toml(text: str, model: type[ModelT], *, name: str) -> ModelT:
    """`text` as a `model`; `name` stands for the file in errors.

    Raises:
        ConfigError: It is no TOML or does not fit; names file, line and key.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {_syntax(str(error), text)}") from error
    try:
        return model.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = [part for part in first["loc"] if isinstance(part, (str, int))]
        line = _line_of(text, path)
        where = f"{name}:{line}" if line else name
        raise ConfigError(f"{where}: {describe_problem(first, model)}") from error


def describe_problem(problem: Mapping[str, Any], model: type[pydantic.BaseModel]) -> str:
    """One sentence for one pydantic error: the key, what was given, what was expected."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        near = near_matches(str(problem["loc"][-1]), known)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        return f"unknown key '{key}'; {hint}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if problem["type"] in ("missing", "value_error") else f" (got {given!r})"
    return f"key '{key}': {message[0].lower() + message[1:]}{shown}" if key else message


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
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_scalar(v)}" for k, v in value.items() if v is not None) + " }"
    if _is_list(value):
        return "[" + ", ".join(_scalar(v) for v in value) + "]"
    return json.dumps(str(value), ensure_ascii=False)


def _syntax(message: str, text: str) -> str:
    """tomllib's message as `line N, key 'k': what`."""
    match = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", message)
    number = int(match[2]) if match else len(text.splitlines())
    what = match[1] if match else message.removesuffix(" (at end of document)")
    lines = text.splitlines()
    content = lines[number - 1] if 0 < number <= len(lines) else ""
    key = content.partition("=")[0].strip().strip("[]\"' ")
    return f"line {number}, key '{key}': {what[0].lower() + what[1:]}"


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
        nested = [a for a in _walk_args(field.annotation) if isinstance(a, type) and issubclass(a, pydantic.BaseModel)]
        if not nested:
            return []
        current = nested[0]
    return [f.alias or name for name, f in current.model_fields.items()]


def _walk_args(annotation: Any) -> list[Any]:
    found = [annotation]
    for arg in getattr(annotation, "__args__", ()):
        found += _walk_args(arg)
    return found
