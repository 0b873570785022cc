"""The cells as CSV: one row per cell and metric, for a spreadsheet or a data frame."""

import csv
import io

from robustbench_x.report.inert import spreadsheet_text
from robustbench_x.result import Report

__all__ = ["render_csv"]

_NAMES = ("encoder", "head", "data", "defense", "knowledge", "attack")
_HEADER = (*_NAMES, "norm", "eps", "n", "n_clean_correct", "n_errors", "metric", "value", "low", "high")


def render_csv(report: Report) -> str:
    """A header and one row per cell and metric; what was not measured is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_HEADER)
    for cell in report.cells:
        names = [spreadsheet_text(getattr(cell, name)) for name in _NAMES]
        threat = [spreadsheet_text(cell.threat.norm), cell.threat.eps]
        for metric, measure in cell.metrics.items():
            figures = ["" if v is None else v for v in (measure.value, measure.low, measure.high)]
            counts = [cell.n, cell.n_clean_correct, cell.n_errors]
            writer.writerow([*names, *threat, *counts, spreadsheet_text(metric), *figures])
    return buffer.getvalue()
