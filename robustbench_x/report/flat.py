"""The cells as CSV: one row per cell and metric, for a spreadsheet or a data frame."""

import csv
import io

from robustbench_x.result import Report

__all__ = ["render_csv"]

_HEADER = (
    "encoder", "head", "data", "defense", "knowledge", "attack", "norm", "eps", "n", "n_clean_correct", "n_errors",
    "metric", "value", "low", "high",
)  # fmt: skip


def render_csv(report: Report) -> str:
    """A header and one row per cell and metric; what was not measured is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_HEADER)
    for cell in report.cells:
        for metric, measure in cell.metrics.items():
            writer.writerow(
                (
                    *(_inert(getattr(cell, name)) for name in _HEADER[:6]),
                    cell.threat.norm,
                    cell.threat.eps,
                    cell.n,
                    cell.n_clean_correct,
                    cell.n_errors,
                    metric,
                    *("" if v is None else v for v in (measure.value, measure.low, measure.high)),
                )
            )
    return buffer.getvalue()


def _inert(text: str) -> str:
    """`text` that no spreadsheet runs as a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
