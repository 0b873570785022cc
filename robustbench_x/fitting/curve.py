"""The loss of every step as lines of JSON, whole again after any kill."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import final

__all__ = ["Curve"]


@final
class Curve:
    """Writes `{"step": 0, "info_nce": 3.4}` and so on to a file, a line a step, each on disk at once.

    Args:
        path: The file; its folder is made when missing.
        done: Steps that are not taken again: of an earlier sitting, the lines of these are kept and later ones dropped.
    """

    def __init__(self, path: Path, *, done: int) -> None:
        kept = [line for line in _lines(path) if _step(line) < done] if done else []
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self._path = path

    def add(self, step: int, losses: Mapping[str, float]) -> None:
        """Appends one step."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **losses}) + "\n")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _step(line: str) -> float:
    """The number of a line's step; infinite for one that was cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
