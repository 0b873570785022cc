"""The shape of the code base: what modules export, how long they are, what they may import."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import robustbench_x
import robustbench_x_attacks
import robustbench_x_defenses

ROOT = Path(__file__).parents[2]
PACKAGES = (robustbench_x, robustbench_x_attacks, robustbench_x_defenses)
MAX_LINES = 400


def modules() -> Iterator[str]:
    for package in PACKAGES:
        yield package.__name__
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__"):
                yield info.name


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if "external" not in path.parts)


@pytest.mark.parametrize("name", list(modules()))
def test_all_is_sorted_and_true(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    exported = getattr(module, "__all__", None)
    if exported is None:
        public = [n for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__module__", "") == name]
        assert not public, f"{name} defines {public} and has no __all__"
        return
    assert list(exported) == sorted(exported, key=_order), f"{name}.__all__ is not sorted"
    assert len(set(exported)) == len(exported)
    missing = [n for n in exported if not hasattr(module, n)]
    assert not missing, f"{name}.__all__ names {missing}"
    for n in exported:
        value = getattr(module, n)
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == name:
            assert (value.__doc__ or "").strip(), f"{name}.{n} has no docstring"


def _order(name: str) -> tuple[int, str]:
    kind = 0 if name.isupper() else 1 if name[:1].isupper() else 2
    return kind, name


@pytest.mark.parametrize("path", sources("robustbench_x"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_imports_no_plugin(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        plugins = [
            n for n in names if n.startswith(("robustbench_x_attacks", "robustbench_x_defenses", "torchattacks"))
        ]
        assert not plugins, f"line {node.lineno if hasattr(node, 'lineno') else 0} imports {plugins}"


def test_no_module_is_longer_than_it_may_be() -> None:
    long = {str(p.relative_to(ROOT)): n for p in sources("robustbench_x", "attacks", "defenses")
            if (n := len(p.read_text(encoding="utf-8").splitlines())) > MAX_LINES}  # fmt: skip
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_every_raises_has_a_match() -> None:
    loose = []
    for path in sources("tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = node.func.attr == "raises" and isinstance(node.func.value, ast.Name)
            if called and not any(keyword.arg == "match" for keyword in node.keywords):
                loose.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not loose, f"pytest.raises without match: {loose}"


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in sources("tests") if path.name not in ("__init__.py", "conftest.py")]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice


def test_everything_is_ascii() -> None:
    found = []
    for path in sources("robustbench_x", "attacks", "defenses", "tests"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.isascii() and path.name != "errors.py":  # the tree at its top is drawn
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert not found, f"characters beyond ASCII: {found}"
