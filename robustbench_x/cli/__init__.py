"""`rbx`: wiring only. Each command is a module; nothing heavy is imported before a command runs."""

from robustbench_x.cli._app import app, main

__all__ = ["app", "main"]
