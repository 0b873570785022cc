"""Surrogate x victim: what a pattern fitted on one encoder does to another."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from robustbench_x.report.words import threat_text
from robustbench_x.result import CellResult, FitInfo, Report

__all__ = ["TransferMatrix", "transfer_matrices"]

_Weights = tuple[str, tuple[int, int]]
"""Digest and input size: what tells encoders apart, however a source is written."""


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
    names: dict[_Weights, str] = {}
    for info in report.encoders:
        names.setdefault((info.sha256, info.input_size), info.source)
    weights = {info.source: (info.sha256, info.input_size) for info in report.encoders}
    groups: dict[tuple[str, str, str], list[CellResult]] = {}
    for cell in report.cells:
        if cell.fit is not None and cell.defense == "none":
            settings = json.dumps(cell.fit.params, sort_keys=True)
            groups.setdefault((cell.fit.plugin, settings, threat_text(cell.threat)), []).append(cell)
    matrices: list[TransferMatrix] = []
    for (plugin, _, budget), cells in groups.items():
        values: dict[tuple[str, str], list[float]] = {}
        for cell in cells:
            assert cell.fit is not None, "only fitted cells are grouped"
            measured = cell.metrics["flip_rate"].value
            victim = names[weights[cell.encoder]]
            if measured is not None:
                values.setdefault((_surrogate(cell.fit, names), victim), []).append(measured)
        if any(surrogate != victim for surrogate, victim in values):
            again = sum(matrix.title.startswith(f"{plugin}, {budget}") for matrix in matrices)
            matrices.append(_matrix(f"{plugin}, {budget}" + (f", other settings {again}" if again else ""), values))
    return tuple(matrices)


def _surrogate(fit: FitInfo, names: Mapping[_Weights, str]) -> str:
    """The encoder an attack was fitted on: as this report calls it, else as the artefact does."""
    known = names.get((fit.encoder_sha256, fit.input_size))
    if known is not None:
        return known
    return f"{fit.encoder} (other weights)" if fit.encoder in names.values() else fit.encoder


def _matrix(title: str, values: Mapping[tuple[str, str], Sequence[float]]) -> TransferMatrix:
    return TransferMatrix(
        title=title,
        fitted_on=tuple(dict.fromkeys(surrogate for surrogate, _ in values)),
        victims=tuple(dict.fromkeys(victim for _, victim in values)),
        flip_rate={pair: sum(rates) / len(rates) for pair, rates in values.items()},
    )
