"""The result on a terminal: the answer first, then a table per victim, then findings and gates."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robustbench_x.findings import FINDINGS
from robustbench_x.report.words import figure, headline, percent, shield, summary, threat_text
from robustbench_x.result import CellResult, Decision, GateVerdict, Report, WorstCase

__all__ = ["print_gates", "print_report"]

_ANSWER_STYLE = {"yes": "bold green", "no": "bold red", "unknown": "bold yellow", "unjudged": "bold yellow"}
_LEVEL_STYLE = {"error": "red", "warning": "yellow", "note": "dim"}
_VERDICT_STYLE = {"pass": "green", "fail": "red", "inconclusive": "yellow", "error": "red"}


def print_report(report: Report, decision: Decision, console: Console) -> None:
    """Prints the whole result."""
    console.print(headline(report, decision), style=_ANSWER_STYLE[decision.answer], markup=False)
    console.print(summary(report), markup=False)
    console.print()
    groups: dict[tuple[str, str, str], list[CellResult]] = {}
    for cell in report.cells:
        groups.setdefault((cell.encoder, cell.head, cell.data), []).append(cell)
    for (encoder, head, data), cells in groups.items():
        worst = [w for w in report.worst_case if (w.encoder, w.head, w.data) == (encoder, head, data)]
        console.print(_victim_table(f"{encoder}, {head} head, {data}", cells, worst))
    if report.gates:
        print_gates(report.gates, console)
    _print_findings(report, console)


def print_gates(verdicts: Sequence[GateVerdict], console: Console) -> None:
    """Prints the verdict table."""
    table = Table(title="Gates", title_justify="left", title_style="bold")
    table.add_column("verdict")
    table.add_column("what was seen")
    for v in sorted(verdicts, key=lambda v: v.verdict == "pass"):
        table.add_row(f"[{_VERDICT_STYLE[v.verdict]}]{v.verdict.upper()}[/]", escape(v.message))
    console.print(table)


def _victim_table(title: str, cells: Sequence[CellResult], worst: Sequence[WorstCase]) -> Table:
    clean = figure(cells[0].metrics["clean_accuracy"])
    table = Table(title=escape(f"{title} (n={cells[0].n}, clean accuracy {clean})"), title_justify="left")
    table.add_column("defence")
    table.add_column("attack")
    table.add_column("budget")
    table.add_column("clean", justify="right")
    table.add_column("robust acc.", justify="right")
    table.add_column("attack success", justify="right")
    table.add_column("8-bit", justify="right")
    table.add_column("s/img", justify="right")
    table.add_column("flags")
    for cell in cells:
        table.add_row(*_row(cell), style="dim" if cell.control else "")
    table.add_section()
    for w in worst:
        table.add_row(
            escape(w.defense), "worst case", threat_text(w.threat), "", figure(w.robust_accuracy), figure(w.asr),
            style="bold",
        )  # fmt: skip
    return table


def _row(cell: CellResult) -> tuple[str, ...]:
    flags = dict.fromkeys((f.id, f.level) for f in cell.flags if f.level != "note")
    seconds = cell.metrics["seconds"].value
    return (
        escape(shield(cell)),
        escape(cell.attack),
        threat_text(cell.threat),
        percent(cell.metrics["clean_accuracy"].value),
        figure(cell.metrics["robust_accuracy"]),
        figure(cell.metrics["asr"]),
        percent(cell.metrics["asr_8bit"].value),
        "-" if seconds is None else f"{seconds:.2f}",
        " ".join(f"[{_LEVEL_STYLE[level]}]{name}[/]" for name, level in flags),
    )


def _print_findings(report: Report, console: Console) -> None:
    serious = [f for f in report.findings if f.level != "note"]
    for f in sorted(serious, key=lambda f: f.level):
        where = escape(f.cell or "the run")
        console.print(f"[{_LEVEL_STYLE[f.level]}]{f.level} {f.id}[/] {where}: {escape(f.message)}")
    for kind in dict.fromkeys(f.id for f in serious):
        if kind in FINDINGS:
            console.print(f"  [dim]{kind}: {escape(FINDINGS[kind].advice)}[/]")
    if notes := len(report.findings) - len(serious):
        console.print(f"[dim]{notes} notes are in report.json[/]")
