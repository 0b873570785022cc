"""How the engine tells what it is doing; the command line draws it, a library user may ignore it."""

from typing import Protocol, final

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Receives the engine's progress, in units of one sample crafted and judged."""

    def begin(self, total: int, done: int) -> None:
        """The run has `total` units, `done` of which were on disk already."""

    def task(self, text: str) -> None:
        """What is being done now."""

    def advance(self, units: int) -> None:
        """So many units were finished."""

    def say(self, text: str) -> None:
        """A line worth keeping: weights loaded, a batch size halved, images unreadable."""


@final
class Silent:
    """Says nothing."""

    def begin(self, total: int, done: int) -> None:
        """Ignored."""

    def task(self, text: str) -> None:
        """Ignored."""

    def advance(self, units: int) -> None:
        """Ignored."""

    def say(self, text: str) -> None:
        """Ignored."""
