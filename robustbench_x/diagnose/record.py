"""A measured cell, as the checks of an evaluation need it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from robustbench_x.metrics import Outcome
from robustbench_x.plan import Cell
from robustbench_x.plugin import AttackSpec
from robustbench_x.result import Measure

__all__ = ["CellRecord", "error_messages"]


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """A measured cell, as the checks need it."""

    cell: Cell
    spec: AttackSpec
    outcome: Outcome
    overrun: np.ndarray
    """`(N,)` pixels outside the budget before projection; NaN in error rows."""
    margin: np.ndarray
    """`(N,)` true logit minus the largest other on the adversarial image; NaN in error rows."""
    seen_fooled: np.ndarray
    """`(N,)` 1 where the victim was seen to be wrong inside the budget, NaN where nobody watched."""
    late_gain: np.ndarray
    """`(N,)` share of the gain in margin that came with the last ten looks at the victim, NaN where unknown."""
    messages: tuple[str, ...]
    """Distinct error messages, most frequent first."""
    num_classes: int
    metrics: dict[str, Measure]


def error_messages(messages: Sequence[str | None]) -> tuple[str, ...]:
    """Distinct messages, most frequent first."""
    counts: dict[str, int] = {}
    for message in messages:
        if message is not None:
            counts[message] = counts.get(message, 0) + 1
    return tuple(sorted(counts, key=lambda m: (-counts[m], m)))
