"""Two runs on the same samples: which events happened in one and not in the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robustbench_x.errors import RunError, UsageError
from robustbench_x.result import CellResult, Report
from robustbench_x.store import read_rows

__all__ = ["EVENTS", "Discordance", "Rows", "discordant", "matching_cells", "rows_by_cell"]

Rows = dict[str, dict[str, Any]]
"""Sample id to row of one cell."""


def rows_by_cell(run: Path) -> dict[str, Rows]:
    """Cell to sample to row of a run's `samples.parquet`."""
    table: dict[str, Rows] = {}
    for row in read_rows(run / "samples.parquet").to_pylist():
        table.setdefault(row["cell"], {})[row["sample"]] = row
    return table


def matching_cells(mine: Report, theirs: Report) -> dict[str, str]:
    """Cells of `mine` to the cells of `theirs` that measured the same thing.

    Two runs of one encoder each are matched whatever the encoders are called: a new checkpoint against the old
    one is what a comparison is mostly for. Cells that only one run has are left out.

    Raises:
        UsageError: Matching cells ran with different attack parameters, so their figures say nothing about the
            models.
    """
    bump = all(len({cell.encoder for cell in report.cells}) == 1 for report in (mine, theirs))

    def key(cell: CellResult) -> tuple[object, ...]:
        names = (cell.head, cell.data, cell.defense, cell.knowledge, cell.attack, cell.threat)
        return names if bump else (cell.encoder, *names)

    known = {key(cell): cell for cell in theirs.cells}
    matched = {}
    for cell in mine.cells:
        other = known.get(key(cell))
        if other is None:
            continue
        mine_params, other_params = _comparable(cell), _comparable(other)
        if mine_params != other_params:
            changed = [name for name in mine_params if mine_params[name] != other_params.get(name)]
            name = changed[0] if changed else "its parameters"
            raise UsageError(
                f"{cell.id}: {cell.attack} ran with another {name} in the two runs "
                f"({mine_params.get(name)} and {other_params.get(name)}), so they cannot be compared"
            )
        matched[cell.id] = other.id
    return matched


def _comparable(cell: CellResult) -> dict[str, Any]:
    """What must be alike for two cells to be about the same attack; which file an artefact came from need not."""
    params = {name: value for name, value in cell.params.items() if name != "artifact" or cell.fit is None}
    if cell.fit is None:
        return params
    fit = cell.fit
    trained = {"surrogate": fit.surrogate, "surrogate_samples": fit.surrogate_samples, "fitted budget": fit.threat}
    return params | trained | {"fitting defense": fit.defense, "fitting knowledge": fit.knowledge}


class Discordance(NamedTuple):
    """How often a metric's event happened in one run, the other, and both, over `pairs` samples judged in both."""

    only_mine: int
    only_theirs: int
    both: int
    pairs: int


def discordant(metric: str, mine: Rows, theirs: Rows, cell: str) -> Discordance:
    """Counts a metric's event over the samples that both runs judged; conditional rates need both correct when clean.

    Raises:
        RunError: The runs evaluated different samples or images, so nothing can be paired.
    """
    if set(mine) != set(theirs):
        raise RunError(f"cell {cell}: this run and the baseline evaluated different samples")
    for sample, row in mine.items():
        if row["sha256"] != theirs[sample]["sha256"]:
            raise RunError(f"cell {cell}: sample {sample} holds different pixels in this run and the baseline")
    event = EVENTS[metric]
    pairs = [
        (event(row), event(theirs[sample]))
        for sample, row in mine.items()
        if row["error"] is None and theirs[sample]["error"] is None
    ]
    # Conditional rates are compared where both runs have a correct clean sample.
    judged = np.array([(a, b) for a, b in pairs if a is not None and b is not None], dtype=bool).reshape(-1, 2)
    a, b = judged[:, 0], judged[:, 1]
    return Discordance(int((a & ~b).sum()), int((~a & b).sum()), int((a & b).sum()), len(judged))


def _accepted(row: Mapping[str, Any], side: str) -> bool:
    """Whether the image of `side` gets past the detector, if there is one; a run of before there were any has none."""
    acceptance = row.get(f"{side}_acceptance")
    return acceptance is None or acceptance >= 0


EVENTS: dict[str, Any] = {
    "asr": lambda r: r["fooled"] if r["clean_correct"] else None,
    "asr_8bit": lambda r: r["adv8_pred"] != r["label"] and _accepted(r, "adv8") if r["clean_correct"] else None,
    "asr_total": lambda r: r["adv_pred"] != r["label"] and _accepted(r, "adv"),
    "robust_accuracy": lambda r: r["clean_correct"] and not r["fooled"],
    "flip_rate": lambda r: r["flipped"],
    "clean_accuracy": lambda r: r["clean_correct"],
    "refused_clean": lambda r: None if r.get("clean_acceptance") is None else not _accepted(r, "clean"),
    "refused": lambda r: None if r.get("adv_acceptance") is None else not _accepted(r, "adv"),
    "recall@1": lambda r: None if r["adv_rank"] is None else r["adv_rank"] <= 1,
    "recall@10": lambda r: None if r["adv_rank"] is None else r["adv_rank"] <= 10,
}
