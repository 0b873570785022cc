"""Checks of everything that was measured of one victim: whether its attacks, together, are evidence."""

from collections.abc import Sequence

import numpy as np

from robustbench_x.diagnose.record import CellRecord
from robustbench_x.findings import finding
from robustbench_x.plan import UNDEFENDED
from robustbench_x.result import Finding, Level

__all__ = [
    "RUNGS",
    "check_attackers",
    "check_budgets",
    "check_control",
    "check_draws",
    "check_refusals",
    "check_transfer",
    "rungs_of",
]

RUNGS = ("oblivious", "transfer", "bpda", "bpda_learned", "full", "universal", "black box")
"""The ladder that a defence has to stand, from attackers who know least of it to those who know all."""
_INVERTED = 0.01
_CONTROL = 0.95
_ERRORS = 2.0
_DRAWS = 20


def check_attackers(records: Sequence[CellRecord], where: str) -> list[Finding]:
    """Whether the attacks on one victim at one budget are evidence at all.

    Args:
        records: Every cell of that victim and budget.
        where: What the findings are about.
    """
    attacks = [record for record in records if not record.spec.control]
    if not attacks:
        return [
            finding("only_controls", f"attacked by {', '.join(r.cell.attack for r in records)} alone", where, figure=0)
        ]
    cell = attacks[0].cell
    if cell.threat.radius == 0:
        return [finding("zero_budget", f"{cell.threat} leaves every image as it is", where, figure=0)]
    found = _inverted(records, where)
    if cell.defense == UNDEFENDED:
        return found
    if all(r.cell.knowledge == "oblivious" for r in attacks):
        return [*found, finding("no_adaptive_attack", f"every image was made without {cell.defense}", where, figure=0)]
    missing = [rung for rung in _wanted(attacks) if not any(rung in rungs_of(r) for r in attacks)]
    if missing:
        text = f"{cell.defense} was not attacked by: {', '.join(missing)}"
        found.append(finding("short_ladder", text, where, figure=len(missing)))
    return found


def rungs_of(record: CellRecord) -> tuple[str, ...]:
    """The rungs of the ladder that a cell stands for; an attack fitted through the defence is on two."""
    spec, level = record.spec, record.cell.knowledge
    if spec.access in ("scores", "labels"):
        return ("black box",) if level == "full" else ()
    if spec.partners_run:
        return ("transfer",)
    if spec.fits:
        return ("universal",) if level in ("bpda", "bpda_learned", "full") else ("oblivious",)
    # What an encoder-level attack does with a defence's gradient is no white-box attack on the victim behind it.
    return (level,) if level == "oblivious" or spec.access == "whitebox" else ()


def _wanted(attacks: Sequence[CellRecord]) -> tuple[str, ...]:
    """The rungs that this defence has: a detector is evaded or not, and changes no pixel to pass gradients through."""
    if any(r.outcome.acceptance is not None for r in attacks):
        return ("oblivious", "full")
    return RUNGS


def _inverted(records: Sequence[CellRecord], where: str) -> list[Finding]:
    """Samples that fall to attackers who know less, and to none who follows the gradient of this very victim."""
    strong = [r for r in records if r.spec.access == "whitebox" and r.cell.knowledge in ("none", "full")]
    weak = [r for r in records if r not in strong and r.cell.knowledge not in ("bpda", "bpda_learned")]
    if not strong or not weak:
        return []
    # A sample that an attack with knowledge failed on is unknown, and tells nothing here.
    correct = np.logical_and.reduce([r.outcome.clean_correct & ~r.outcome.error for r in strong])
    by_weak = np.logical_or.reduce([r.outcome.fooled for r in weak]) & correct
    by_strong = np.logical_or.reduce([r.outcome.fooled for r in strong])
    lost = int((by_weak & ~by_strong).sum())
    if not lost:
        return []
    share = lost / int(correct.sum())
    names = sorted({r.cell.attack for r in weak if (r.outcome.fooled & correct & ~by_strong).any()})
    text = f"{lost} of {int(correct.sum())} correct samples fall to {', '.join(names)} and to no white-box attack"
    level: Level = "error" if lost > 1 and share > _INVERTED else "warning"
    return [finding("inversion", text, where, figure=share, level=level)]


def check_control(record: CellRecord, control: CellRecord) -> list[Finding]:
    """Whether an attack that leaves samples behind a defence at least breaks the victim without it.

    Args:
        record: A cell of full knowledge behind a defence.
        control: The same attack on the undefended victim.
    """
    rate, defended = control.metrics["asr"].value, record.metrics["asr"].value
    if rate is None or defended is None or rate >= _CONTROL or defended >= rate:
        return []
    text = f"without the defence it breaks {rate:.2f}, with it {defended:.2f}"
    return [finding("weak_control", text, record.cell.id, figure=rate)]


def check_transfer(record: CellRecord, control: CellRecord) -> list[Finding]:
    """How many of the images that fool the undefended victim fail on the defended one.

    Args:
        record: A cell of an oblivious attack behind a defence.
        control: The same images on the undefended victim.
    """
    both = ~record.outcome.error & ~control.outcome.error & record.outcome.clean_correct
    won = control.outcome.fooled & both
    lost = int((won & ~record.outcome.fooled).sum())
    if not lost:
        return []
    text = f"{lost} of {int(won.sum())} images that fool the undefended victim do not fool this one"
    return [finding("transfer_failure", text, record.cell.id, figure=lost / int(won.sum()))]


def check_refusals(record: CellRecord, rate: float, where: str) -> list[Finding]:
    """Whether a detector refuses more clean images than it may: then it is safe for having refused to work."""
    refused = record.metrics.get("refused_clean")
    if refused is None or refused.value is None or refused.low is None or refused.low <= rate:
        return []
    text = f"{refused.value:.2f} of the clean images are refused, {rate:.2f} may be"
    return [finding("over_refusal", text, where, figure=refused.value)]


def check_budgets(groups: Sequence[Sequence[CellRecord]], where: str) -> list[Finding]:
    """Whether the worst case of one victim falls with the budget.

    Args:
        groups: All cells of the victim at each budget, smaller budgets first.
        where: What the findings are about.
    """
    found = []
    robust = [np.logical_and.reduce([r.outcome.clean_correct & ~r.outcome.fooled for r in group]) for group in groups]
    for smaller, larger, before, after in zip(groups, groups[1:], robust, robust[1:], strict=False):
        count, rise = len(after), float(after.mean() - before.mean())
        # Of the difference of two shares of the same samples, as if they were independent: an upper bound.
        spread = float(np.sqrt((before.var() + after.var()) / count))
        if rise > 0 and rise > _ERRORS * spread:
            text = f"{before.mean():.2f} at {smaller[0].cell.threat}, {after.mean():.2f} at {larger[0].cell.threat}"
            found.append(finding("rising_curve", text, where, figure=rise / spread if spread else float(count)))
    return found


def check_draws(records: Sequence[CellRecord], draws: int, *, stochastic: bool, where: str) -> list[Finding]:
    """Whether a random defence was judged on enough draws; one draw is an error, fewer than twenty a warning."""
    if not stochastic or draws >= _DRAWS or all(r.spec.control for r in records):
        return []
    level: Level = "error" if draws < 2 else "warning"
    return [finding("few_draws", f"each image was judged on {draws} draws", where, figure=draws, level=level)]
