"""The words every view shares: the answer in one line, figures with intervals, names of victims."""

from robustbench_x.numbers import format_eps
from robustbench_x.result import CellResult, Decision, Measure, Report, Threat, WorstCase

__all__ = ["count", "figure", "headline", "percent", "shield", "summary", "threat_text", "victim", "worst_first"]

_ANSWERS = {"yes": "YES", "no": "NO", "unknown": "UNKNOWN", "unjudged": "NOT JUDGED"}


def headline(decision: Decision) -> str:
    """The first line of every view: is it safe to ship, and why; it always agrees with the exit code."""
    return f"Safe to ship? {_ANSWERS[decision.answer]}: {decision.reason} (exit code {decision.exit_code})"


def summary(report: Report) -> str:
    """The worst victim in one sentence, from the per-sample worst case."""
    ranked = worst_first(report)
    if not ranked:
        return "No victim has a measured worst case."
    worst = ranked[0]
    doubt = " The evaluation carries errors or doubts: read the findings." if _doubtful(report) else ""
    return (
        f"Most broken: {victim(worst)}. At {threat_text(worst.threat)} the attacks together fool {figure(worst.asr)} "
        f"of the {count(worst.n_clean_correct, 'image')} it gets right; robust accuracy is "
        f"{figure(worst.robust_accuracy)} of all {worst.n}.{doubt}"
    )


def worst_first(report: Report) -> list[WorstCase]:
    """Measured worst cases, most broken first."""
    measured = [w for w in report.worst_case if w.asr.value is not None]
    return sorted(measured, key=lambda w: (-(w.asr.value or 0), w.robust_accuracy.value or 0))


def victim(entry: CellResult | WorstCase) -> str:
    """Encoder, head, data and defence as one name."""
    defended = "" if entry.defense == "none" else f" behind {entry.defense}"
    return f"{entry.encoder} + {entry.head} head on {entry.data}{defended}"


def shield(cell: CellResult) -> str:
    """A cell's defence with what the attacker knows of it."""
    return cell.defense if cell.defense == "none" else f"{cell.defense} ({cell.knowledge})"


def threat_text(threat: Threat) -> str:
    """A budget as people read it."""
    return f"{threat.norm} {format_eps(threat.eps)}"


def percent(value: float | None) -> str:
    """A rate as a percentage; a dash where nothing was measured."""
    return "-" if value is None else f"{100 * value:.0f} %"


def figure(measure: Measure) -> str:
    """A rate with its interval."""
    if measure.value is None:
        return "not measured"
    if measure.low is None or measure.high is None:
        return percent(measure.value)
    return f"{100 * measure.value:.0f} % [{100 * measure.low:.0f}, {100 * measure.high:.0f}]"


def count(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count(1, "gate"), count(2, "gate")
    ('1 gate', '2 gates')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _doubtful(report: Report) -> bool:
    return report.status != "complete" or any(f.level == "error" for f in report.findings)
