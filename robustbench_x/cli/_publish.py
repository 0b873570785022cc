"""Where a result goes: the run folder, and the step summary of a CI."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robustbench_x.errors import RunError
from robustbench_x.report.markdown import LIMIT, render_markdown
from robustbench_x.result import Decision, Report, write_report
from robustbench_x.store import write_atomically

__all__ = ["hush_stdout", "publish", "verdict_holds", "write_step_summary"]

_LEAST = 1000


@contextmanager
def verdict_holds() -> Iterator[None]:
    """Prints inside may meet a closed pipe (`rbx audit | head`): the exit code stays the verdict's all the same."""
    try:
        yield
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # rich answers a closed pipe with SystemExit(1), the code of a failed gate
        hush_stdout()


def hush_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's last flush has nowhere to fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def publish(report: Report, decision: Decision, run: Path) -> None:
    """Writes `report.json` and `report.md` into the run folder, and the Markdown to a CI's step summary."""
    write_report(report, run)
    write_atomically(run / "report.md", render_markdown(report, decision))
    write_step_summary(report, decision)


def write_step_summary(report: Report, decision: Decision) -> None:
    """Appends the Markdown to the file that GITHUB_STEP_SUMMARY names, where it is set.

    The limit is that of a whole step, so what the step wrote before counts.

    Raises:
        RunError: The file cannot be written.
    """
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return
    path = Path(name)
    try:
        left = LIMIT - (path.stat().st_size if path.exists() else 0)
        if left < _LEAST:
            return
        with path.open("a", encoding="utf-8") as file:
            file.write(render_markdown(report, decision, limit=left - 1) + "\n")
    except OSError as error:
        raise RunError(f"GITHUB_STEP_SUMMARY={name} cannot be written: {error.strerror}") from error
