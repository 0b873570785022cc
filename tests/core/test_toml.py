"""TOML in and out: errors that name file, line and key; writing that reads back."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustbench_x.errors import ConfigError
from robustbench_x.toml import dump_toml, parse_toml, read_toml


class Inner(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str
    size: Annotated[int, pydantic.Field(gt=0)] | Literal["auto"] = "auto"
    weights: dict[str, float] = {}


class Outer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    seed: int = 0
    inner: tuple[Inner, ...] = ()
    single: Inner | None = None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\nsed = 2\n", r"^here:2: unknown key 'sed'; did you mean 'seed'\?$"),
        ("zzz = 2\n", r"^here:1: unknown key 'zzz'; known: seed, inner, single$"),
        ("seed = 'x'\n", r"^here:1: key 'seed': input should be a valid integer.* \(got 'x'\)$"),
        ("# c\n[[inner]]\nname = 'a'\n\n[[inner]]\nnam = 'b'\n", r"^here:5: key 'inner\.2\.name': missing$"),
        (
            "[[inner]]\nname = 'a'\n[[inner]]\nname = 'b'\nsze = 3\n",
            r"^here:5: unknown key 'inner\.2\.sze'; did you mean",
        ),
        (
            "[[inner]]\nname='a'\nsize='big'\n",
            r"^here:3: key 'inner\.1\.size': .* or input should be 'auto' \(got 'big'\)$",
        ),
        (
            "[single]\nname = 'a'\nsize = 0\n",
            r"^here:3: key 'single\.size': input should be greater than 0 or .*got 0\)$",
        ),
        ("[single]\nname = 'a'\nweights = { a = 'x' }\n", r"^here:3: key 'single\.weights\.a': .*valid number"),
        ("single = 3\n", r"^here:1: key 'single': must be a table"),
        ("seed = \n", r"^here:1: key 'seed': not valid TOML, invalid value$"),
        ("seed = 1\nseed = 2\n", r"^here:2: key 'seed': not valid TOML, cannot overwrite a value$"),
        ("\n\n[single\n", r"^here:3: key 'single': not valid TOML"),
        ("seed = [1,\n", r"^here:1: .*not valid TOML"),
    ],
)
def test_errors_name_file_line_and_key_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_toml(text, Outer, name="here")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*nope\.toml; `rbx init` writes"):
        read_toml(tmp_path / "nope.toml", Outer)
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        read_toml(tmp_path, Outer)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"seed = '\xff'")
    with pytest.raises(ConfigError, match=r"binary\.toml is no UTF-8 text \(byte 8"):
        read_toml(binary, Outer)


def test_a_byte_order_mark_and_carriage_returns_are_no_error(tmp_path: Path) -> None:
    file = tmp_path / "windows.toml"
    file.write_bytes("\ufeffseed = 3\r\n[single]\r\nname = 'a'\r\n".encode())
    assert read_toml(file, Outer).seed == 3


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), TEXT
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(TEXT, SCALARS, max_size=3))
TABLES = st.dictionaries(TEXT, VALUES, max_size=4)


@given(st.dictionaries(TEXT, st.one_of(VALUES, st.lists(TABLES, min_size=1, max_size=2)), max_size=4))
def test_what_is_written_reads_back_the_same(values: dict[str, Any]) -> None:
    assert tomllib.loads(dump_toml(values)) == values


def test_none_is_left_out() -> None:
    assert tomllib.loads(dump_toml({"a": None, "t": {"b": None, "c": 1}})) == {"t": {"c": 1}}
