"""The result on a terminal: the answer first, then failed gates, a table per victim, and findings.

Names and messages come from outside, so everything goes through `Text`: a string would be searched for rich
markup and emoji codes, and `python:car:make` would drive away.
"""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustbench_x.findings import FINDINGS
from robustbench_x.report.defenses import COLUMNS, DEFENSES_MEAN, defense_tables
from robustbench_x.report.inert import plain
from robustbench_x.report.layers import MEANING, layer_tables
from robustbench_x.report.transfer import transfer_matrices
from robustbench_x.report.words import count, figure, headline, percent, shield, summary, threat_text
from robustbench_x.result import CellResult, Decision, Finding, GateVerdict, Report, WorstCase

__all__ = ["print_answer", "print_gates", "print_report"]

_ANSWER_STYLE = {"yes": "bold green", "no": "bold red", "unknown": "bold yellow", "unjudged": "bold yellow"}
_LEVEL_STYLE = {"error": "red", "warning": "yellow"}
_VERDICT_STYLE = {"pass": "green", "fail": "red", "inconclusive": "yellow", "error": "red"}
_SHOWN = 3


def print_report(report: Report, decision: Decision, console: Console) -> None:
    """Prints the whole result; of the gates those that did not pass."""
    print_answer(decision, console)
    console.print(Text(plain(summary(report), 600)))
    console.print()
    if report.gates:
        print_gates(report.gates, console, failed_only=True)
    groups: dict[tuple[str, str, str], list[CellResult]] = {}
    for cell in report.cells:
        groups.setdefault((cell.encoder, cell.head, cell.data), []).append(cell)
    for (encoder, head, data), cells in groups.items():
        worst = [w for w in report.worst_case if (w.encoder, w.head, w.data) == (encoder, head, data)]
        console.print(_title(encoder, head, data, cells))
        console.print(_victim_table(cells, worst))
    _print_defenses(report, console)
    _print_layers(report, console)
    _print_transfer(report, console)
    _print_findings(report, console)


def print_answer(decision: Decision, console: Console) -> None:
    """Prints the one line that says what the exit code says."""
    console.print(Text(plain(headline(decision), 600), style=_ANSWER_STYLE[decision.answer]))


def print_gates(verdicts: Sequence[GateVerdict], console: Console, *, failed_only: bool = False) -> None:
    """Prints the verdict table, failed gates first."""
    held = [v for v in verdicts if v.verdict == "pass"]
    failed = [v for v in verdicts if v.verdict != "pass"]
    console.print(Text(f"Gates: {len(failed)} failed, {len(held)} held", style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for v in failed if failed_only else [*failed, *held]:
        seen = Text(plain(v.message)).append(f"\n{plain(v.cell)}", style="dim")
        table.add_row(Text(v.verdict.upper(), style=_VERDICT_STYLE[v.verdict]), seen)
    if table.row_count:
        console.print(table)
    console.print()


def _title(encoder: str, head: str, data: str, cells: Sequence[CellResult]) -> Text:
    title = Text(plain(f"{encoder} + {head} head on {data}"), style="bold")
    clean = cells[0].metrics.get("clean_accuracy")
    known = f", clean accuracy {figure(clean)}" if clean is not None else ""
    return title.append(f"\n{count(cells[0].n, 'image')}{known}; [95 % interval]", style="not bold dim")


_COLUMNS = {
    "classification": ("attack", "defence", "clean", "robust accuracy", "attack success", "8-bit", "s/img"),
    "retrieval": ("attack", "defence", "clean", "map@10", "recall@1", "clean@1", "s/img"),
    "image_text": ("attack", "defence", "clean", "TR@1", "IR@1", "target", "s/img"),
    "entailment": ("attack", "defence", "clean", "entailed", "attack success", "target", "s/img"),
    "captioning": ("attack", "defence", "clean", "robust accuracy", "attack success", "target", "s/img"),
}
"""`clean` is the clean accuracy, map@10, TR@1 or share entailed; `clean@1` the clean recall@1; `target` how often the
texts of the target come first, are entailed, or fit best."""
_FIGURES = {
    "classification": ("clean_accuracy", "robust_accuracy", "asr", "asr_8bit"),
    "retrieval": ("clean_map@10", "map@10", "recall@1", "clean_recall@1"),
    "image_text": ("clean_tr@1", "tr@1", "ir@1", "target_tr@1"),
    "entailment": ("clean_entailed", "entailed", "asr", "target_entailed"),
    "captioning": ("clean_accuracy", "robust_accuracy", "asr", "targeted_success"),
}
"""What stands in the third to the sixth column."""


def _victim_table(cells: Sequence[CellResult], worst: Sequence[WorstCase]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    several = len({threat_text(cell.threat) for cell in cells}) > 1
    for name in _COLUMNS[cells[0].task]:
        left = name in ("attack", "defence")
        least = {"attack": 10, "defence": 11}.get(name)
        table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold", min_width=least)
    for cell in cells:
        table.add_row(*_row(cell, several), style="dim" if cell.control else "")
    if cells[0].task in ("classification", "captioning"):
        table.add_section()
        for w in worst:
            name = f"worst case {threat_text(w.threat)}" if several else "worst case"
            table.add_row(
                Text(plain(name)), Text(plain(w.defense)), "", figure(w.robust_accuracy), figure(w.asr), style="bold"
            )
    return table


def _row(cell: CellResult, several: bool) -> tuple[Text | str, ...]:
    name = f"{cell.attack} {threat_text(cell.threat)}" if several else cell.attack
    label = Text(plain(name, 80))
    if any(f.level != "note" for f in cell.flags):
        label.append(" !", style="yellow")
    seconds = _value(cell, "seconds")
    clean, *figures, last = _FIGURES[cell.task]
    return (
        label,
        Text(plain(shield(cell), 80)),
        percent(_value(cell, clean)),
        *(figure(m) if (m := cell.metrics.get(name)) else "-" for name in figures),
        percent(_value(cell, last)),
        "-" if seconds is None else f"{seconds:.2f}",
    )


def _print_defenses(report: Report, console: Console) -> None:
    for found in defense_tables(report):
        console.print(Text(plain(f"Defences of {found.victim}"), style="bold"))
        console.print(Text(DEFENSES_MEAN, style="dim"))
        # Only what this victim has: no column of blanks, and none of refusals without a detector.
        shown = [k for k, _ in enumerate(COLUMNS) if any(row[k] for row in found.rows)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for k in shown:
            table.add_column(COLUMNS[k], justify="left" if k < 2 else "right", overflow="fold")
        for row in found.rows:
            table.add_row(*(Text(plain(row[k])) for k in shown))
        console.print(table)


def _print_layers(report: Report, console: Console) -> None:
    for found in layer_tables(report):
        console.print(Text(plain(f"Layer vulnerability of {found.encoder}"), style="bold"))
        console.print(Text(MEANING, style="dim"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("layer", overflow="fold")
        for name in found.columns:
            table.add_column(Text(plain(name)), justify="right", overflow="fold")
        for row in found.rows:
            table.add_row(*(Text(plain(value)) for value in row))
        console.print(table)


def _print_transfer(report: Report, console: Console) -> None:
    for matrix in transfer_matrices(report):
        console.print(Text(plain(f"Transfer: {matrix.title}"), style="bold"))
        console.print(Text("mean flip rate over heads and data sets, undefended", style="dim"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("fitted on, against", overflow="fold")
        for victim in matrix.victims:
            table.add_column(Text(plain(victim)), justify="right", overflow="fold")
        for surrogate in matrix.fitted_on:
            rates = (percent(matrix.flip_rate.get((surrogate, victim))) for victim in matrix.victims)
            table.add_row(Text(plain(surrogate)), *rates)
        console.print(table)


def _value(cell: CellResult, metric: str) -> float | None:
    measure = cell.metrics.get(metric)
    return None if measure is None else measure.value


def _print_findings(report: Report, console: Console) -> None:
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for f in report.findings:
        if f.level != "note":
            kinds.setdefault((f.level, f.id), []).append(f)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for (level, kind), found in sorted(kinds.items()):
        known = FINDINGS.get(kind)
        text = Text(plain(f"{kind}: {known.title}" if known else kind), style="bold").append(f" ({len(found)} x)")
        for f in found[:_SHOWN]:
            text.append(f"\n{plain(f.message)}", style="not bold")
            text.append(f"\n  {plain(f.cell or 'the whole run')}", style="not bold dim")
        if len(found) > _SHOWN:
            text.append(f"\n{len(found) - _SHOWN} more are in report.json", style="not bold")
        if known:
            text.append(f"\nWhat to do: {known.advice}", style="not bold italic")
        table.add_row(Text(level, style=_LEVEL_STYLE[level]), text)
    if table.row_count:
        console.print(Text("Findings: doubts about this evaluation (! in the tables)", style="bold"))
        console.print(table)
    if notes := sum(f.level == "note" for f in report.findings):
        console.print(Text(f"{count(notes, 'note')} in report.json", style="dim"))
