"""`rbx compare`: two runs side by side, with paired significance per cell."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compare"]


def compare(
    run_a: Annotated[Path, typer.Argument(help="Earlier run.")],
    run_b: Annotated[Path, typer.Argument(help="Later run.")],
    metric: Annotated[str, typer.Option(help="Rate to compare.")] = "asr",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two runs on the same images, cell by cell."""
    from rich.console import Console

    from robustbench_x.compare import compare_runs, print_changes

    changes = compare_runs(run_a, run_b, metric)
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps([dataclasses.asdict(change) for change in changes], indent=2))
    else:
        print_changes(changes, metric, Console())
