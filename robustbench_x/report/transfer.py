"""Surrogate x victim: what a pattern fitted on one encoder does to another."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from robustbench_x.report.words import threat_text
from robustbench_x.result import CellResult, Report

__all__ = ["TransferMatrix", "transfer_matrices"]


@dataclass(frozen=True, kw_only=True)
class TransferMatrix:
    """One fitted attack at one budget: mean flip rate over heads and data sets, by encoder fitted on and victim.

    A pair that was not audited is absent. `title` names attack and budget; `cells` counts what a mean is over.
    """

    title: str
    fitted_on: tuple[str, ...]
    victims: tuple[str, ...]
    flip_rate: Mapping[tuple[str, str], float]
    cells: Mapping[tuple[str, str], int]


def transfer_matrices(report: Report) -> tuple[TransferMatrix, ...]:
    """The matrix of every fitted attack that met an encoder it was not fitted on; undefended cells only."""
    groups: dict[tuple[str, str, str], list[CellResult]] = {}
    for cell in report.cells:
        if cell.fit is not None and cell.defense == "none":
            settings = json.dumps(cell.fit.params, sort_keys=True)
            groups.setdefault((cell.fit.plugin, settings, threat_text(cell.threat)), []).append(cell)
    return tuple(
        _matrix(f"{plugin}, {budget}", cells)
        for (plugin, _, budget), cells in groups.items()
        if any(cell.fit is not None and cell.fit.encoder != cell.encoder for cell in cells)
    )


def _matrix(title: str, cells: Sequence[CellResult]) -> TransferMatrix:
    values: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        assert cell.fit is not None, "only fitted cells are grouped"
        measured = cell.metrics["flip_rate"].value
        if measured is not None:
            values.setdefault((cell.fit.encoder, cell.encoder), []).append(measured)
    return TransferMatrix(
        title=title,
        fitted_on=tuple(dict.fromkeys(surrogate for surrogate, _ in values)),
        victims=tuple(dict.fromkeys(victim for _, victim in values)),
        flip_rate={pair: sum(rates) / len(rates) for pair, rates in values.items()},
        cells={pair: len(rates) for pair, rates in values.items()},
    )
