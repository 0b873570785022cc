"""`rbx init`: a commented audit file and gate policy to start from."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["init"]


def init(
    directory: Annotated[Path, typer.Argument(help="Where to write audit.toml and gate.toml.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Write a commented audit.toml and gate.toml."""
    from importlib.resources import files

    from robustbench_x.errors import UsageError

    presets = files("robustbench_x") / "presets"
    targets = {name: directory / name for name in ("audit.toml", "gate.toml")}
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file; name a folder")
    existing = [str(path) for path in targets.values() if path.exists()]
    if existing and not force:
        raise UsageError(f"{', '.join(existing)} exists already; --force overwrites it")
    directory.mkdir(parents=True, exist_ok=True)
    for name, path in targets.items():
        path.write_text((presets / name).read_text(encoding="utf-8"), encoding="utf-8")
        typer.echo(f"wrote {path}")
    typer.echo("next: rbx audit audit.toml --policy gate.toml")
