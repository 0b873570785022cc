"""`rbx merge`: join the shards of one audit."""

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["merge"]


def merge(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, one per shard.")],
    out: Annotated[Path, typer.Option(help="New folder for the whole run.")],
) -> None:
    """Join the shards of one audit into one run; judge it with rbx gate."""
    from rich.console import Console

    from robustbench_x.cli._publish import publish, verdict_holds
    from robustbench_x.gate import decide
    from robustbench_x.merge import merge_runs
    from robustbench_x.registry import load_registry
    from robustbench_x.report.terminal import print_report

    report = merge_runs(runs, out, load_registry(), command="rbx " + " ".join(sys.argv[1:]))
    decision = decide(report, None, fail_on=())
    report = report.model_copy(update={"decision": decision})
    publish(report, decision, out)
    with verdict_holds():
        print_report(report, decision, Console())
    raise typer.Exit(decision.exit_code)
