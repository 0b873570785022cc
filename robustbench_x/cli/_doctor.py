"""`rbx doctor`: versions, devices, extras, and the command that fixes what is missing."""

from typing import Annotated

import typer

__all__ = ["doctor"]


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check the installation: versions, devices, optional extras, plugins."""
    from robustbench_x.doctor import examine

    checks = examine()
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = "ok" if check.ok else ("missing" if check.optional else "BROKEN")
            typer.echo(f"{mark:8} {check.name}: {check.found}" + (f"\n         fix: {check.fix}" if check.fix else ""))
    raise typer.Exit(0 if all(check.ok or check.optional for check in checks) else 2)
