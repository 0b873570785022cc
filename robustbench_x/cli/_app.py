"""The application: commands, version, and the one place where errors become exit codes."""

import os
import sys
import traceback
from typing import Annotated

import typer

from robustbench_x._version import __version__
from robustbench_x.cli import _audit, _catalogue, _compare, _craft, _doctor, _fit, _gate, _init, _merge, _report
from robustbench_x.errors import RobustbenchError
from robustbench_x.report.inert import plain

__all__ = ["app", "main"]

# typer carries its own copy of click in recent versions; the base class is reached from what is public.
_ClickError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

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
app.command(name="fit")(_fit.fit)
app.command(name="craft")(_craft.craft)
app.command(name="list")(_catalogue.list_)
app.command(name="describe")(_catalogue.describe)
app.command(name="init")(_init.init)
app.command(name="doctor")(_doctor.doctor)


_CTRL_C = 130
_INTERRUPTED = "rbx: interrupted; run the same command again to continue"


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
        code = app(standalone_mode=False) or 0
        if code == _CTRL_C:  # recent typer turns Ctrl-C into this code itself
            typer.echo(_INTERRUPTED, err=True)
        sys.exit(code)
    except RobustbenchError as error:
        typer.echo(f"rbx: {plain(str(error), 2000)}", err=True)
        sys.exit(error.exit_code)
    except _ClickError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]  # the help text
            sys.exit(2)
        typer.echo(f"rbx: {plain(_sentence(error), 2000)}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo(_INTERRUPTED, err=True)
        sys.exit(_CTRL_C)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)  # whoever read the output had enough; click's 1 would say that a gate failed
        raise
    except Exception:  # noqa: BLE001 - our own bug: shown in full, and never with the code of a failed gate
        traceback.print_exc()
        typer.echo("rbx: internal error; please report the traceback above", err=True)
        sys.exit(RobustbenchError.exit_code)


def _sentence(error: Exception) -> str:
    """A usage error of the command line's own parser as one sentence; the parser adds near matches itself."""
    text = " ".join(str(getattr(error, "message", error)).split()).replace("Value error, ", "").rstrip(".")
    return f"{text}; rbx --help lists what there is"
