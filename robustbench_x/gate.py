"""Gates: a policy against a stored result, and what a run comes to.

A gate passes only when the whole interval clears its threshold, fails when the whole interval violates it, and
is inconclusive in between. Where a sample ended in an error nothing passes.
"""

import fnmatch
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robustbench_x.errors import ConfigError, NothingEvaluatedError, UsageError, near_matches
from robustbench_x.numbers import format_eps
from robustbench_x.pairing import Rows, discordant, matching_cells, rows_by_cell
from robustbench_x.plan import Cell
from robustbench_x.policy import WORST_CASE, BaselineRule, GateRule, Policy
from robustbench_x.result import CellResult, Decision, GateVerdict, Level, Measure, Report, WorstCase, read_report
from robustbench_x.stats import paired_difference, samples_to_decide

__all__ = ["check_baseline", "check_policy", "decide", "judge_gates"]

_PATTERNS = ("encoder", "head", "data", "defense", "knowledge")
Kind = Literal["pass", "fail", "inconclusive", "error"]
Inconclusive = Literal["fail", "pass", "point"]


def judge_gates(
    report: Report, policy: Policy, *, run: Path | None = None, baseline: Path | None = None
) -> tuple[GateVerdict, ...]:
    """Every gate on every cell it selects.

    Args:
        report: The result to judge.
        policy: The thresholds.
        run: The run's folder; needed with a baseline, whose comparison is sample by sample.
        baseline: The folder of the run to compare with.

    Raises:
        ConfigError: A gate selects no cell, or a baseline rule has no baseline.
        NothingEvaluatedError: The report holds no cell.
        RunError: The baseline is damaged, or evaluated other samples or pixels.
    """
    if not report.cells:
        raise NothingEvaluatedError("the run holds no cell, so there is nothing to judge")
    controls = {cell.attack for cell in report.cells if cell.control}
    verdicts: list[GateVerdict] = []
    for number, rule in enumerate(policy.gate, start=1):
        seen = _select(rule, report)
        if not seen:
            raise ConfigError(f"gate {number} ({rule.title}): {_why_nothing(rule, report.cells, controls)}")
        verdicts += [_judge(rule, s, policy.inconclusive) for s in seen]
    if policy.baseline is not None:
        if baseline is None or run is None:
            raise ConfigError(_NO_BASELINE)
        check_baseline(baseline)
        verdicts += _judge_baseline(policy.baseline, report, run, baseline, policy.inconclusive)
    return tuple(verdicts)


def decide(
    report: Report, verdicts: Sequence[GateVerdict] | None, *, fail_on: Sequence[Level], strict: bool = False
) -> Decision:
    """The exit code of a finished run and the sentence that says the same.

    The first that holds decides: 5 nothing was evaluated; 3 the run is incomplete, or a sample ended in an error;
    1 a gate did not pass; 4 the evaluation is unreliable; 0 otherwise, and `yes` only when gates were judged.
    (2 is for what cannot run at all, and never gets here.)

    Args:
        report: The result.
        verdicts: Of the policy; None when there is none.
        fail_on: Finding levels that make it unreliable, when there is a policy.
        strict: Whether findings of level error count without a policy too.
    """
    levels = {*(fail_on if verdicts is not None else ()), *(("error",) if strict else ())}
    doubts = [f for f in report.findings if f.level in levels]
    errors = sum(cell.n_errors for cell in report.cells)
    total = sum(cell.n for cell in report.cells)
    if total == 0:
        return Decision(exit_code=5, answer="unknown", reason="nothing was evaluated")
    if report.status == "incomplete":
        return Decision(exit_code=3, answer="unknown", reason="the run is incomplete")
    if errors or report.status != "complete":
        return Decision(exit_code=3, answer="unknown", reason=f"{errors} of {total} judgements ended in an error")
    failed = [v for v in verdicts or () if v.verdict != "pass"]
    if failed:
        reason = f"{len(failed)} of {_gates(verdicts)} failed, first: {failed[0].message}; {failed[0].cell}"
        return Decision(exit_code=1, answer="no", reason=reason)
    if doubts:
        doubt = f"{doubts[0].id}: {doubts[0].message} ({doubts[0].cell or 'the whole run'})"
        many = f"{len(doubts)} findings, first " if len(doubts) > 1 else ""
        return Decision(exit_code=4, answer="unknown", reason=f"the evaluation is unreliable: {many}{doubt}")
    if verdicts:
        return Decision(exit_code=0, answer="yes", reason=f"all of {_gates(verdicts)} held")
    return Decision(exit_code=0, answer="unjudged", reason="no gate policy was given, so nothing was held to a limit")


def check_policy(policy: Policy, cells: Sequence[Cell], *, controls: Set[str], has_baseline: bool) -> None:
    """Refuses, before anything runs, a policy that could not be judged on the planned `cells`.

    Raises:
        ConfigError: A gate selects no cell, or a [baseline] has no run to compare with.
    """
    if policy.baseline is not None and not has_baseline:
        raise ConfigError(_NO_BASELINE)
    for number, rule in enumerate(policy.gate, start=1):
        if not any(_fits(rule, c) and _aims(rule, c.attack, control=c.attack in controls) for c in cells):
            raise ConfigError(f"gate {number} ({rule.title}): {_why_nothing(rule, cells, controls)}")


def check_baseline(baseline: Path) -> None:
    """Refuses a baseline that is no finished run, before anything is judged by it.

    Raises:
        UsageError: There is no run.
        RunError: It is unfinished or damaged.
    """
    if not baseline.exists():
        raise UsageError(f"--baseline {baseline}: there is no such run")
    read_report(baseline)


_NO_BASELINE = "the policy has a [baseline]; name the run to compare with: --baseline RUN"


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a rule looks at: a cell or a worst case."""

    label: str
    measured: Measure
    n: int
    errors: int


def _select(rule: GateRule, report: Report) -> list[_Seen]:
    entries: Sequence[CellResult | WorstCase] = report.worst_case if rule.attack == WORST_CASE else report.cells
    seen = []
    for entry in entries:
        if not _fits(rule, entry):
            continue
        if isinstance(entry, WorstCase):
            label, measured = _label(entry), entry.asr if rule.metric == "asr" else entry.robust_accuracy
        elif _aims(rule, entry.attack, control=entry.control):
            # A metric that a cell lacks was not measured, and a gate on it cannot pass.
            label, measured = entry.id, entry.metrics.get(rule.metric, Measure(value=None))
        else:
            continue
        n = entry.n_clean_correct if rule.metric in ("asr", "asr_8bit") else entry.n
        seen.append(_Seen(label=label, measured=measured, n=n, errors=entry.n_errors))
    return seen


def _aims(rule: GateRule, attack: str, *, control: bool) -> bool:
    """Whether a rule is about this attack; a control is meant only where it is named."""
    if rule.attack == WORST_CASE:
        return True
    return rule.attack == attack or (not control and fnmatch.fnmatchcase(attack, rule.attack))


def _fits(rule: GateRule, entry: CellResult | WorstCase | Cell) -> bool:
    if rule.eps is not None and not _same_eps(entry.threat.eps, rule.eps):
        return False
    names = [name for name in _PATTERNS if not (name == "knowledge" and isinstance(entry, WorstCase))]
    return all(_matches(getattr(entry, name), getattr(rule, name)) for name in names)


def _matches(value: str, pattern: str) -> bool:
    # The name itself first: `pgd[50]` as a pattern would not match `pgd[50]`.
    return value == pattern or fnmatch.fnmatchcase(value, pattern)


def _same_eps(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9


def _label(worst: WorstCase) -> str:
    threat = f"{worst.threat.norm} {format_eps(worst.threat.eps)}"
    return f"{worst.encoder} | {worst.head} | {worst.data} | {worst.defense} | {WORST_CASE} | {threat}"


def _why_nothing(rule: GateRule, cells: Sequence[CellResult | Cell], controls: Set[str]) -> str:
    """Which pattern selects nothing, with near matches."""
    names: dict[str, set[str]] = {name: {getattr(cell, name) for cell in cells} for name in _PATTERNS}
    names["attack"] = {cell.attack for cell in cells} | {WORST_CASE}
    for name, known in names.items():
        pattern = getattr(rule, name)
        if not any(_matches(value, pattern) for value in known):
            near = near_matches(pattern, known)
            hint = f"did you mean {near[0]}?" if near else f"the run has {', '.join(sorted(known))}"
            return f"no cell has {name} = '{pattern}'; {hint}"
    budgets = sorted({cell.threat.eps for cell in cells})
    if rule.eps is not None and not any(_same_eps(eps, rule.eps) for eps in budgets):
        return f"no cell has eps = {format_eps(rule.eps)}; the run has {', '.join(map(format_eps, budgets))}"
    aimed = {cell.attack for cell in cells if _matches(cell.attack, rule.attack)}
    if aimed and aimed <= controls:
        return f"attack = '{rule.attack}' selects controls only, and a control is judged where its whole name is given"
    return "no cell matches all of its patterns together"


def _judge(rule: GateRule, seen: _Seen, inconclusive: Inconclusive) -> GateVerdict:
    measured = seen.measured
    value, low, high = measured.value, measured.low, measured.high
    if value is None or not math.isfinite(value):
        kind: Kind = "error"
        text = f"{rule.metric} was not measured"
    elif seen.errors:
        kind, text = "error", f"{seen.errors} of the samples ended in an error, so {rule.title} cannot be judged"
    else:
        ends = (value if low is None else low, value, value if high is None else high)
        kind, text = _hold(ends, rule.threshold, at_most=rule.max is not None)
        text = f"{rule.metric} {_shown(measured)} {text} {rule.bound}"
        if kind == "inconclusive":
            needed = samples_to_decide(round(value * seen.n), seen.n, rule.threshold)
            text += f"; about {needed} samples would decide" if needed else "; no number of samples would decide"
            kind, text = _resolve(text, inconclusive, held=_held(value, rule.threshold, at_most=rule.max is not None))
    return GateVerdict(
        gate=rule.title,
        metric=rule.metric,
        bound=rule.bound,
        cell=seen.label,
        verdict=kind,
        value=value,
        low=low,
        high=high,
        message=text,
    )


def _held(value: float, threshold: float, *, at_most: bool) -> bool:
    return value <= threshold if at_most else value >= threshold


def _hold(ends: tuple[float, float, float], threshold: float, *, at_most: bool) -> tuple[Kind, str]:
    """Whether an interval `(low, value, high)` clears a threshold, in a word and a verb."""
    low, _, high = ends
    held = [_held(end, threshold, at_most=at_most) for end in (low, high)]
    if all(held):
        return "pass", "holds"
    return ("inconclusive", "straddles") if any(held) else ("fail", "violates")


def _resolve(text: str, inconclusive: Inconclusive, *, held: bool) -> tuple[Kind, str]:
    """What an inconclusive gate counts as under the policy; the message keeps saying what was seen."""
    if inconclusive == "pass":
        return "pass", f"{text} (counts as passed)"
    if inconclusive == "point":
        return ("pass" if held else "fail"), f"{text} (judged by the point)"
    return "inconclusive", text


def _judge_baseline(
    rule: BaselineRule, report: Report, run: Path, baseline: Path, inconclusive: Inconclusive
) -> list[GateVerdict]:
    before = read_report(baseline)
    matched = matching_cells(report, before)
    dropped = [cell for cell in before.cells if not cell.control and cell.id not in matched.values()]
    mine, theirs = rows_by_cell(run), rows_by_cell(baseline)
    limits = [(n, v, 1) for n, v in rule.max_increase.items()] + [(n, v, -1) for n, v in rule.max_decrease.items()]
    verdicts = [
        _judge_change(cell.id, metric, limit, sign, mine[cell.id], theirs[matched[cell.id]], inconclusive)
        for cell in report.cells
        if cell.id in matched and not cell.control
        for metric, limit, sign in limits
    ]
    if not verdicts:
        raise ConfigError(f"--baseline {baseline}: it shares no cell with this run")
    return verdicts + [_dropped(cell.id, metric, limit, sign) for cell in dropped for metric, limit, sign in limits]


def _dropped(cell: str, metric: str, limit: float, sign: int) -> GateVerdict:
    """A cell that the baseline measured and this run did not: leaving an attack out is no improvement."""
    title = f"{metric} {'increase' if sign > 0 else 'decrease'}"
    return GateVerdict(
        gate=f"{title} <= {limit:g}",
        metric=metric,
        bound=f"<= {limit:g}",
        cell=cell,
        verdict="error",
        value=None,
        message=f"the baseline measured this cell and this run did not, so {title} cannot be judged",
    )


def _judge_change(
    cell: str, metric: str, limit: float, sign: int, mine: Rows, theirs: Rows, inconclusive: Inconclusive
) -> GateVerdict:
    """The paired change of a rate, turned so that more is what the rule limits."""
    pairs = discordant(metric, mine, theirs, cell)
    rose, fell = (pairs.only_mine, pairs.only_theirs) if sign > 0 else (pairs.only_theirs, pairs.only_mine)
    change = paired_difference(fell, rose, pairs.pairs)
    errors = sum(row["error"] is not None for rows in (mine, theirs) for row in rows.values())
    title = f"{metric} {'increase' if sign > 0 else 'decrease'}"
    if errors:
        kind: Kind = "error"
        text = f"{errors} samples of this run or the baseline ended in an error, so {title} cannot be judged"
    elif change.value is None or change.low is None or change.high is None:
        kind, text = "error", f"{title} cannot be judged: no sample counts in both runs"
    else:
        kind, verb = _hold((change.low, change.value, change.high), limit, at_most=True)
        interval = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
        text = f"{title} {interval} on {pairs.pairs} paired samples {verb} <= {limit:g}"
        if kind == "inconclusive":
            kind, text = _resolve(text, inconclusive, held=change.value <= limit)
    return GateVerdict(
        gate=f"{title} <= {limit:g}",
        metric=metric,
        bound=f"<= {limit:g}",
        cell=cell,
        verdict=kind,
        value=change.value,
        low=change.low,
        high=change.high,
        message=text,
    )


def _gates(verdicts: Sequence[GateVerdict] | None) -> str:
    number = len(verdicts or ())
    return f"{number} gate" if number == 1 else f"{number} gates"


def _shown(measured: Measure) -> str:
    if measured.low is None or measured.high is None:
        return f"{measured.value:.4g}"
    return f"{measured.value:.3f} [{measured.low:.3f}, {measured.high:.3f}]"
