"""Checks of the evaluation itself: probes of a victim before it is attacked, and of cells after they are measured."""

from robustbench_x.diagnose.cells import check_cell, check_pair
from robustbench_x.diagnose.probes import probe_defense, probe_detector, probe_gradient, probe_loss, probe_victim
from robustbench_x.diagnose.record import CellRecord, error_messages
from robustbench_x.diagnose.victims import (
    check_attackers,
    check_budgets,
    check_control,
    check_draws,
    check_refusals,
    check_transfer,
)

__all__ = [
    "CellRecord",
    "check_attackers",
    "check_budgets",
    "check_cell",
    "check_control",
    "check_draws",
    "check_pair",
    "check_refusals",
    "check_transfer",
    "error_messages",
    "probe_defense",
    "probe_detector",
    "probe_gradient",
    "probe_loss",
    "probe_victim",
]
