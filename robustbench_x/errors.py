"""Every error this library raises on purpose.

RobustbenchError                 root; `exit_code` is what `rbx` returns
├── UsageError                2  the user can fix it: one sentence, no traceback
│   ├── ConfigError           2  a TOML file, flag or parameter is wrong
│   ├── UnknownNameError      2  a name the registry does not know (lists near matches)
│   ├── MissingExtraError     2  an optional package is needed (prints the pip command)
│   ├── SourceError           2  an encoder or head could not be loaded
│   └── DataError             2  images could not be found, read or matched to classes
├── PluginError               2  a plugin package is broken or registers something malformed
├── RunError                  3  a stored run is incomplete, damaged or holds another audit
├── NothingEvaluatedError     5  there was nothing to measure
└── SampleError               -  an attack, defence or model failed on images: error rows, never "robust"
    ├── RangeError            -  a batch left [0, 1]
    ├── AttackError           -  the attack cannot run this case, and says why
    └── BudgetError           -  a query cap was exceeded
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "AttackError",
    "BudgetError",
    "ConfigError",
    "DataError",
    "MissingExtraError",
    "NothingEvaluatedError",
    "PluginError",
    "RangeError",
    "RobustbenchError",
    "RunError",
    "SampleError",
    "SourceError",
    "UnknownNameError",
    "UsageError",
]


class RobustbenchError(Exception):
    """Root of the tree above. `exit_code` is the process status `rbx` ends with."""

    exit_code = 3


class UsageError(RobustbenchError):
    """The user asked for something that cannot be; the message says what to do instead."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file, flag or parameter is wrong."""


class UnknownNameError(UsageError, LookupError):
    """A name is not registered; the message lists near matches, then everything available."""

    def __init__(self, kind: str, name: str, available: Iterable[str]) -> None:
        names = sorted(available)
        near = near_matches(name, names)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        listing = ", ".join(names) if len(names) <= 30 else f"{len(names)} names; `rbx list` prints them"
        super().__init__(f"unknown {kind} '{name}'; {hint}available: {listing}")


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, *, package: str, extra: str) -> None:
        super().__init__(f"{what} needs the package {package}: pip install 'robustbench-x[{extra}]'")


class SourceError(UsageError):
    """An encoder or head could not be loaded as asked."""


class DataError(UsageError):
    """Images could not be found, decoded or matched to classes."""


class PluginError(RobustbenchError):
    """A plugin failed to import or registered something malformed; nothing runs until it is fixed."""

    exit_code = 2


class RunError(RobustbenchError):
    """A stored run is incomplete, damaged, or not the audit that was asked for."""

    exit_code = 3


class NothingEvaluatedError(RobustbenchError):
    """No sample was evaluated, so there is no verdict to give."""

    exit_code = 5


class SampleError(RobustbenchError):
    """Something failed on a batch of images; its samples become error rows."""


class RangeError(SampleError):
    """A batch is not in [0, 1]; nothing here clips silently."""


class AttackError(SampleError):
    """The attack cannot run this case; the message says why."""


class BudgetError(SampleError):
    """An attack asked for more queries than its cap."""


def near_matches(name: str, available: Iterable[str]) -> list[str]:
    """Up to three of `available` that look like `name`, best first."""
    return difflib.get_close_matches(name, list(available), n=3, cutoff=0.55)
