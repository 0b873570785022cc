"""The result on a terminal: the answer first, then a table per victim, then findings and gates."""

from collections.abc import Sequence

from rich import box
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
    table = Table(title=escape(f"{title} (n={cells[0].n})"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    several = len({threat_text(cell.threat) for cell in cells}) > 1
    columns = ["attack", "defence", "clean", "robust accuracy", "attack success", "8-bit", "s/img"]
    for name in columns:
        left = name in ("attack", "defence")
        table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for cell in cells:
        table.add_row(*_row(cell, several), style="dim" if cell.control else "")
    table.add_section()
    for w in worst:
        name = f"worst case {threat_text(w.threat)}" if several else "worst case"
        table.add_row(name, escape(w.defense), "", figure(w.robust_accuracy), figure(w.asr), style="bold")
    return table


def _row(cell: CellResult, several: bool) -> tuple[str, ...]:
    seconds = cell.metrics["seconds"].value
    flagged = any(f.level != "note" for f in cell.flags)
    name = f"{cell.attack} {threat_text(cell.threat)}" if several else cell.attack
    return (
        escape(name) + (" [yellow]![/]" if flagged else ""),
        escape(shield(cell)),
        percent(cell.metrics["clean_accuracy"].value),
        figure(cell.metrics["robust_accuracy"]),
        figure(cell.metrics["asr"]),
        percent(cell.metrics["asr_8bit"].value),
        "-" if seconds is None else f"{seconds:.2f}",
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
