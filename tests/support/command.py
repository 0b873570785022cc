"""`rbx` called in this process as a user types it, in a folder of the test's own."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from robustbench_x.cli import main

__all__ = ["Command", "Ended"]


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


class Command:
    """Calls the function that the command `rbx` calls, with `columns` of terminal.

    Args:
        capsys: Catches what is printed.
        monkeypatch: Takes back every change.
        folder: Where it runs; code of the user's that the encoders come from is written and imported there.
        code: The source of that module.
        module: Its name.
        columns: Width of the terminal.
    """

    def __init__(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        *,
        code: str = "",
        module: str = "",
        columns: int = 100,
    ) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("COLUMNS", str(columns))
        if module:
            monkeypatch.delitem(sys.modules, module, raising=False)
        if code:
            (folder / f"{module}.py").write_text(code)

    def __call__(self, *args: str) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["rbx", *args])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        return Ended(code, *self._capsys.readouterr())
