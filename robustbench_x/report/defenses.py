"""Defences as a table: what each is worth against everyone together, beside what it costs."""

from collections.abc import Mapping
from dataclasses import dataclass

from robustbench_x.report.words import figure, percent, threat_text
from robustbench_x.result import CellResult, DefenseInfo, Report, WorstCase

__all__ = ["COLUMNS", "DEFENSES_MEAN", "DefenseTable", "defense_tables"]

COLUMNS = ("defence", "budget", "worst case", "oblivious only", "clean", "cost", "time", "refused clean / attacked")
DEFENSES_MEAN = (
    "Worst case: robust accuracy over every attack and knowledge, sample by sample: what the defence is worth. "
    "Oblivious only: the lowest after any one attack that did not know it. Cost: clean accuracy lost. Time: of defence "
    "and encoder, over the encoder's own"
)

_Key = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class DefenseTable:
    """The defences of one victim; `rows` in the order of `COLUMNS`, the undefended control first."""

    victim: str
    rows: tuple[tuple[str, ...], ...]


def defense_tables(report: Report) -> tuple[DefenseTable, ...]:
    """One table for each victim that was attacked behind a defence."""
    cells: dict[_Key, list[CellResult]] = {}
    for cell in report.cells:
        cells.setdefault((cell.encoder, cell.head, cell.data), []).append(cell)
    infos = {(info.encoder, info.data, info.defense): info for info in report.defenses}
    tables = []
    for key, own in cells.items():
        worst = [w for w in report.worst_case if (w.encoder, w.head, w.data) == key]
        if any(w.defense != "none" for w in worst):
            tables.append(_table(key, own, worst, infos))
    return tuple(tables)


def _table(
    key: _Key,
    cells: list[CellResult],
    worst: list[WorstCase],
    infos: Mapping[tuple[str, str, str], DefenseInfo],
) -> DefenseTable:
    encoder, head, data = key
    bare = _clean(cells, "none")
    rows = []
    for w in worst:
        behind = [c for c in cells if (c.defense, c.threat) == (w.defense, w.threat)]
        clean, info = _clean(behind, w.defense), infos.get((encoder, data, w.defense))
        rows.append(
            (
                w.defense,
                threat_text(w.threat),
                figure(w.robust_accuracy),
                percent(_least([c for c in behind if c.knowledge == "oblivious" and not c.control])),
                percent(clean),
                "" if w.defense == "none" else _points(bare, clean),
                _times(info),
                _refused(behind),
            )
        )
    return DefenseTable(victim=f"{encoder} + {head} head on {data}", rows=tuple(rows))


def _clean(cells: list[CellResult], defense: str) -> float | None:
    values = [v for c in cells if c.defense == defense and (v := c.metrics["clean_accuracy"].value) is not None]
    return max(values, default=None)  # lower in a cell only where some of its samples ended in an error


def _least(cells: list[CellResult]) -> float | None:
    values = [v for c in cells if (v := c.metrics["robust_accuracy"].value) is not None]
    return min(values) if values else None


def _points(bare: float | None, clean: float | None) -> str:
    return "-" if bare is None or clean is None else f"{100 * (bare - clean):+.0f} points"


def _times(info: DefenseInfo | None) -> str:
    if info is None:
        return ""
    if info.seconds is None or not info.encoder_seconds:
        return "not measured"
    return f"{info.seconds / info.encoder_seconds:.1f} x"


def _refused(cells: list[CellResult]) -> str:
    """Shares of clean and of adversarial images that a detector refuses, the latter over the attacks that evade least
    and most."""
    clean = [v for c in cells if "refused_clean" in c.metrics and (v := c.metrics["refused_clean"].value) is not None]
    refused = [
        v for c in cells if not c.control and "refused" in c.metrics and (v := c.metrics["refused"].value) is not None
    ]
    if not clean or not refused:
        return ""
    return f"{percent(clean[0])} / {percent(min(refused))} to {percent(max(refused))}"
