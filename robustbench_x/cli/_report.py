"""`rbx report`: renders a view again from the stored result."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Format", "report"]


class Format(StrEnum):
    """Views that this version renders."""

    md = "md"
    json = "json"
    csv = "csv"


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    format_: Annotated[Format, typer.Option("--format", help="View.")],
    out: Annotated[Path | None, typer.Option(help="File to write; stdout without it.")] = None,
) -> None:
    """Render a view of a finished run."""
    from robustbench_x.errors import UsageError
    from robustbench_x.gate import decide
    from robustbench_x.report.flat import render_csv
    from robustbench_x.report.markdown import render_markdown
    from robustbench_x.result import read_report
    from robustbench_x.store import write_atomically

    stored = read_report(run)
    decision = stored.decision or decide(stored, None, fail_on=())
    views = {
        Format.md: lambda: render_markdown(stored, decision),
        Format.json: lambda: stored.model_dump_json(indent=2) + "\n",
        Format.csv: lambda: render_csv(stored),
    }
    text = views[format_]()
    if out is None:
        typer.echo(text, nl=False)
    else:
        try:
            write_atomically(out, text)
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written: {(error.strerror or str(error)).lower()}") from error
