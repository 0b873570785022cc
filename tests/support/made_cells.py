"""Measured cells made by hand, for tests of the checks."""

from typing import Any

import numpy as np

from robustbench_x.diagnose import CellRecord
from robustbench_x.metrics import Outcome, compute
from robustbench_x.plan import Cell
from robustbench_x.plugin import AttackSpec
from robustbench_x.registry import load_registry
from robustbench_x.result import Measure
from robustbench_x.threat import ThreatModel

__all__ = ["NOISE", "PGD", "THREAT", "made_key", "made_record"]

PGD, NOISE = (load_registry().attacks[name] for name in ("pgd", "noise"))
THREAT = ThreatModel(eps=8 / 255)


def made_key(**changes: Any) -> Cell:
    """The key of an undefended cell, unless changed."""
    held: dict[str, Any] = {
        "encoder": "e", "head": "h", "data": "d", "defense": "none", "knowledge": "none", "attack": "pgd",
        "threat": THREAT,
    }  # fmt: skip
    return Cell(**{**held, **changes})


def made_record(
    n: int = 40,
    *,
    fooled: int = 30,
    spec: AttackSpec = PGD,
    cell: Cell | None = None,
    moved: float = 8 / 255,
    margin: float = 1.0,
    seen: np.ndarray | float = np.nan,
    late: np.ndarray | float = np.nan,
    classes: int = 4,
    **columns: Any,
) -> CellRecord:
    """An honest cell: all clean right, the first `fooled` broken, the rest moved by `moved`."""
    label = np.arange(n) % classes
    adversarial = np.where(np.arange(n) < fooled, (label + 1) % classes, label)
    values: dict[str, Any] = {
        "label": label,
        "clean_pred": label.copy(),
        "adv_pred": adversarial,
        "adv8_pred": adversarial.copy(),
        "error": np.zeros(n, dtype=bool),
        "linf": np.full(n, moved),
        "l2": np.full(n, moved * 10),
        "ssim": np.full(n, 0.9),
        "feature_cosine": np.full(n, 0.5),
        "forwards": np.full(n, 20.0),
        "backwards": np.full(n, 20.0),
        "seconds": np.zeros(n),
        "target": np.full(n, -1),
        **columns,
    }
    outcome = Outcome(**values)
    return CellRecord(
        cell=cell or made_key(),
        spec=spec,
        outcome=outcome,
        overrun=np.zeros(n),
        margin=np.where(np.arange(n) < fooled, -margin, margin),
        seen_fooled=np.full(n, seen),
        late_gain=np.full(n, late),
        messages=("boom",) if outcome.error.any() else (),
        num_classes=classes,
        metrics={k: Measure(value=v.value, low=v.low, high=v.high) for k, v in compute(outcome).items()},
    )
