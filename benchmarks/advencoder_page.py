"""docs/results/advencoder.md."""

from pathlib import Path


def write(page: Path, work: Path) -> None:
    """Later."""
