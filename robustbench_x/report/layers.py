"""Layer vulnerability as a table: a row per layer, a column per attack and budget that measured it."""

from collections.abc import Sequence
from dataclasses import dataclass

from robustbench_x.provenance import LayerMapInfo
from robustbench_x.report.words import threat_text
from robustbench_x.result import Report

__all__ = ["MEANING", "LayerTable", "layer_tables"]

MEANING = (
    "When one layer alone is attacked: how far the tokens of all layers turn on average, and in brackets the pooled "
    "features (1 - cosine, 0 to 2); * marks what the attack goes for"
)


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """The layer maps of one encoder; `rows` hold a layer's name and one figure per column, empty where unmeasured."""

    encoder: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def layer_tables(report: Report) -> tuple[LayerTable, ...]:
    """One table for each encoder with a layer map, layers shallow to deep."""
    return tuple(
        LayerTable(
            encoder=info.source, columns=_columns(info.layer_vulnerability), rows=_rows(info.layer_vulnerability)
        )
        for info in report.encoders
        if info.layer_vulnerability
    )


def _columns(maps: Sequence[LayerMapInfo]) -> tuple[str, ...]:
    return tuple(
        f"{m.attack} {threat_text(m.threat)}" + ("" if m.defense == "none" else f" through {m.defense} ({m.knowledge})")
        for m in maps
    )


def _rows(maps: Sequence[LayerMapInfo]) -> tuple[tuple[str, ...], ...]:
    figures = [
        {d.layer: f"{d.vulnerability:.2f}{'*' if d.chosen else ''} ({d.features:.2f})" for d in m.layers} for m in maps
    ]
    names = dict.fromkeys(d.layer for m in maps for d in m.layers)
    return tuple((name, *(column.get(name, "") for column in figures)) for name in names)
