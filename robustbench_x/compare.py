"""Two runs side by side: what got better, what got worse, and what cannot be told."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustbench_x.errors import ConfigError, UsageError, near_matches
from robustbench_x.metrics import METRICS
from robustbench_x.pairing import EVENTS, Discordance, discordant, matching_cells, rows_by_cell
from robustbench_x.report.inert import plain
from robustbench_x.result import read_report
from robustbench_x.stats import mcnemar_exact, paired_difference

__all__ = ["Change", "compare_runs", "print_changes"]

_ORDER: tuple[Literal["worse", "better", "cannot be told"], ...] = ("worse", "better", "cannot be told")
_STYLE = {"worse": "bold red", "better": "bold green", "cannot be told": "dim"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One cell in two runs: the paired change of a rate from A to B, its 95 % interval, McNemar's exact p.

    None where no sample was judged in both runs.
    """

    cell: str
    pairs: int
    before: float | None
    after: float | None
    change: float | None
    low: float | None
    high: float | None
    p: float | None
    verdict: Literal["better", "worse", "cannot be told"]


def compare_runs(run_a: Path, run_b: Path, metric: str) -> list[Change]:
    """Every cell that both runs have, compared sample by sample.

    Raises:
        ConfigError: The metric is unknown or not a per-sample rate.
        RunError: A run is damaged, or a shared cell evaluated other samples or pixels.
        UsageError: The runs share no cell (other data, budget or attack), or ran it with other parameters.
    """
    if metric not in EVENTS:
        near = near_matches(metric, EVENTS)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(EVENTS)}"
        raise ConfigError(f"'{metric}' cannot be compared sample by sample; {hint}")
    shared = matching_cells(read_report(run_b), read_report(run_a))
    if not shared:
        raise UsageError(f"{run_a} and {run_b} share no cell: head, data, defence, attack and budget must agree")
    before, after = rows_by_cell(run_a), rows_by_cell(run_b)
    return [_change(b, metric, discordant(metric, after[b], before[a], b)) for b, a in shared.items()]


def print_changes(changes: Sequence[Change], metric: str, console: Console) -> None:
    """Prints a table, worse cells first."""
    counts = Counter(c.verdict for c in changes)
    console.print(Text(f"{metric}: {', '.join(f'{counts[word]} {word}' for word in _ORDER)}", style="bold"))
    console.print(Text("A to B, paired sample by sample, [95 % interval]", style="dim"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("cell", "pairs", "A", "B", "change", "p"):
        table.add_column(column, justify="left" if column == "cell" else "right", no_wrap=column != "cell")
    for c in sorted(changes, key=lambda c: _ORDER.index(c.verdict)):
        interval = "-" if c.change is None else f"{c.change:+.3f} [{c.low:+.3f}, {c.high:+.3f}]"
        figures = (_plain(c.before), _plain(c.after), interval, _plain(c.p))
        cell = Text(c.verdict, style=_STYLE[c.verdict]).append(f"\n{plain(c.cell)}", style="default")
        table.add_row(cell, str(c.pairs), *figures)
    console.print(table)


def _change(cell: str, metric: str, pairs: Discordance) -> Change:
    interval = paired_difference(pairs.only_theirs, pairs.only_mine, pairs.pairs)
    verdict: Literal["better", "worse", "cannot be told"] = "cannot be told"
    if interval.low is not None and interval.high is not None and not interval.low <= 0 <= interval.high:
        rose = interval.low > 0
        verdict = "better" if rose == bool(METRICS[metric].higher_is_better) else "worse"
    return Change(
        cell=cell,
        pairs=pairs.pairs,
        before=(pairs.only_theirs + pairs.both) / pairs.pairs if pairs.pairs else None,
        after=(pairs.only_mine + pairs.both) / pairs.pairs if pairs.pairs else None,
        change=interval.value,
        low=interval.low,
        high=interval.high,
        p=mcnemar_exact(pairs.only_theirs, pairs.only_mine) if pairs.pairs else None,
        verdict=verdict,
    )


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
