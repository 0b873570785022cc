"""`rbx list` and `rbx describe`: the catalogue, from the registry."""

from enum import StrEnum
from typing import Annotated, Any

import typer

__all__ = ["Kind", "describe", "list_"]


class Kind(StrEnum):
    """What can be listed."""

    attacks = "attacks"
    defenses = "defenses"
    hardenings = "hardenings"
    encoders = "encoders"
    heads = "heads"
    data = "data"


def list_(
    kind: Annotated[Kind | None, typer.Argument(help="One kind; without it, all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List everything that is installed: attacks, defences, hardenings, encoders, heads, data."""
    from robustbench_x.catalogue import catalogue
    from robustbench_x.registry import load_registry

    entries = catalogue(load_registry())
    chosen = {k: v for k, v in entries.items() if kind is None or k == kind}
    if as_json:
        _echo_json(chosen)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from robustbench_x.report.inert import plain

    for name, rows in chosen.items():
        Console().print(Text(name, style="bold"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        columns = _COLUMNS[name]
        for column in columns:
            table.add_column(column, no_wrap=column in ("name", "access"), overflow="fold")
        for row in rows:
            table.add_row(*(Text(plain(_text(row[column]))) for column in columns))
        Console().print(table)


def describe(
    name: Annotated[str, typer.Argument(help="Name of an attack, defence, hardening, head, encoder or data source.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe one entry: what it does, what it may see, its parameters, its source."""
    from robustbench_x.catalogue import describe_entry
    from robustbench_x.registry import load_registry

    entry = describe_entry(load_registry(), name)
    if as_json:
        _echo_json(entry)
        return
    for key, value in entry.items():
        if key == "params":
            typer.echo("parameters:" if value else "parameters: none")
            for p in value:
                typer.echo(f"  {p['name']} = {p['default']!r} ({p['type']}): {p['help']}")
        elif key != "documentation" and value not in ("", [], {}):
            typer.echo(f"{key}: {_text(value)}")
    if entry.get("documentation"):
        typer.echo(f"\n{entry['documentation']}")


_COLUMNS = {
    "attacks": ("name", "access", "norms", "summary"),
    "defenses": ("name", "knowledge", "summary"),
    "hardenings": ("name", "inner", "summary"),
    "encoders": ("usage", "names", "summary"),
    "heads": ("name", "summary"),
    "data": ("usage", "names", "summary"),
}
"""What fits a terminal; `--json` and `rbx describe` have the rest."""


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{key} {_text(entry)}" for key, entry in value.items() if entry not in ("", []))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _echo_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))
