"""The engine's progress on stderr: a bar for people, lines for a log."""

import time
from types import TracebackType
from typing import Self, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from robustbench_x.report.inert import plain

__all__ = ["Bar", "Lines", "progress_on"]

_EVERY_SECONDS = 30.0


def progress_on(console: Console, *, opening: str) -> "Bar | Lines":
    """A bar where `console` is a terminal, lines otherwise; `opening` is said once something is under way."""
    return Bar(console, opening) if console.is_terminal else Lines(console, opening)


@final
class Lines:
    """A line when an attack has begun to make progress, and one every half minute: what a CI log can use."""

    def __init__(self, console: Console, opening: str) -> None:
        self._console = console
        self._opening = opening
        self._total = self._done = 0
        self._task = self._shown = ""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def begin(self, total: int, done: int) -> None:
        """See `Progress`."""
        self._total, self._done = total, done

    def task(self, text: str) -> None:
        """See `Progress`."""
        self._task = text
        if time.monotonic() - self._last > _EVERY_SECONDS:  # a training, or another long wait without samples
            self._shown, self._last = text, time.monotonic()
            self.say(text)

    def advance(self, units: int) -> None:
        """See `Progress`."""
        self._done += units
        now = time.monotonic()
        if self._task != self._shown or now - self._last > _EVERY_SECONDS:
            self._shown, self._last = self._task, now
            self.say(f"{self._done}/{self._total} {self._task}")

    def say(self, text: str) -> None:
        """See `Progress`."""
        opening, self._opening = self._opening, ""
        for line in filter(None, (opening, text)):
            self._console.print(Text(plain(line)), soft_wrap=True)


@final
class Bar:
    """A bar with the time left, gone when the work is done."""

    def __init__(self, console: Console, opening: str) -> None:
        self._opening = opening
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, total: int, done: int) -> None:
        """See `Progress`."""
        self._progress.update(self._task, total=total, completed=done)

    def task(self, text: str) -> None:
        """See `Progress`."""
        self._progress.update(self._task, description=plain(text, 100))

    def advance(self, units: int) -> None:
        """See `Progress`."""
        self._progress.advance(self._task, units)

    def say(self, text: str) -> None:
        """See `Progress`."""
        opening, self._opening = self._opening, ""
        for line in filter(None, (opening, text)):
            self._progress.console.print(Text(plain(line), style="dim"), soft_wrap=True)
