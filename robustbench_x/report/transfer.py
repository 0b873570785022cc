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

    A pair that was not audited is absent. Encoders are told apart by their weights and input size, not by how a source
    is written. `title` names attack and budget.
    """

    title: str
    fitted_on: tuple[str, ...]
    victims: tuple[str, ...]
    flip_rate: Mapping[tuple[str, str], float]


def transfer_matrices(report: Report) -> tuple[TransferMatrix, ...]:
    """The matrix of every fitted attack that met an encoder it was not fitted on; undefended cells only."""
    names = {(info.sha256, info.input_size): info.source for info in report.encoders}
    groups: dict[tuple[str, str, str], list[CellResult]] = {}
    for cell in report.cells:
        if cell.fit is not None and cell.defense == "none":
            settings = json.dumps(cell.fit.params, sort_keys=True)
            groups.setdefault((cell.fit.plugin, settings, threat_text(cell.threat)), []).append(cell)
    made = [_matrix(f"{plugin}, {budget}", cells, names) for (plugin, _, budget), cells in groups.items()]
    return tuple(matrix for matrix in made if any(surrogate != victim for surrogate, victim in matrix.flip_rate))


def _matrix(
    title: str, cells: Sequence[CellResult], names: Mapping[tuple[str, tuple[int, int]], str]
) -> TransferMatrix:
    values: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        assert cell.fit is not None, "only fitted cells are grouped"
        measured = cell.metrics["flip_rate"].value
        if measured is not None:
            surrogate = names.get((cell.fit.encoder_sha256, cell.fit.input_size), cell.fit.encoder)
            values.setdefault((surrogate, cell.encoder), []).append(measured)
    return TransferMatrix(
        title=title,
        fitted_on=tuple(dict.fromkeys(surrogate for surrogate, _ in values)),
        victims=tuple(dict.fromkeys(victim for _, victim in values)),
        flip_rate={pair: sum(rates) / len(rates) for pair, rates in values.items()},
    )
