"""The application: commands, version, and the one place where errors become exit codes."""

import os
import sys
import traceback
from typing import Annotated

import typer

from robustbench_x._version import __version__
from robustbench_x.cli import _audit, _catalogue, _compare, _doctor, _gate, _init, _merge, _report
from robustbench_x.errors import RobustbenchError
from robustbench_x.report.inert import plain

__all__ = ["app", "main"]

app = typer.Typer(
    name="rbx",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Can the pre-trained encoder you ship be broken through its downstream heads?",
    epilog="Exit codes: 0 held, 1 a gate failed, 2 usage, 3 incomplete or errors, 4 unreliable, 5 nothing evaluated.",
)
app.command(name="audit")(_audit.audit)
app.command(name="gate")(_gate.gate)
app.command(name="compare")(_compare.compare)
app.command(name="report")(_report.report)
app.command(name="merge")(_merge.merge)
app.command(name="list")(_catalogue.list_)
app.command(name="describe")(_catalogue.describe)
app.command(name="init")(_init.init)
app.command(name="doctor")(_doctor.doctor)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"robustbench_x {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Runs `rbx`; a library error becomes one sentence on stderr and its exit code."""
    # Before torch is loaded: threads that wait by spinning make a shared machine (any CI runner) several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except RobustbenchError as error:
        typer.echo(f"rbx: {plain(str(error), 2000)}", err=True)
        sys.exit(error.exit_code)
    except Exception:  # noqa: BLE001 - our own bug: shown in full, and never with the code of a failed gate
        traceback.print_exc()
        typer.echo("rbx: internal error; please report the traceback above", err=True)
        sys.exit(RobustbenchError.exit_code)
    except KeyboardInterrupt:
        typer.echo("rbx: interrupted; run the same command again to continue", err=True)
        sys.exit(130)
