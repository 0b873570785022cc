"""Gates: a policy against a stored result. A gate passes only when the whole interval clears its threshold."""

import fnmatch
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import ConfigDict, Field

from robustbench_x.config import Number
from robustbench_x.errors import ConfigError, NothingEvaluatedError, near_matches
from robustbench_x.metrics import METRICS
from robustbench_x.pairing import EVENTS, Rows, discordant, rows_by_cell
from robustbench_x.plan import Cell
from robustbench_x.result import CellResult, Decision, GateVerdict, Level, Measure, Report, WorstCase
from robustbench_x.stats import paired_difference, samples_to_decide
from robustbench_x.toml import read_toml

__all__ = ["Policy", "check_policy", "decide", "judge_gates", "load_policy"]

_PATTERNS = ("encoder", "head", "data", "defense", "knowledge")
_WORST = "worst_case"
_WORST_METRICS = ("asr", "robust_accuracy")


class _Frozen(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GateRule(_Frozen):
    """One threshold on one metric, on every cell its patterns (fnmatch) select; the noise control is left out
    unless `attack` names it."""

    metric: str
    max: Number | None = None
    min: Number | None = None
    attack: str = "*"
    encoder: str = "*"
    head: str = "*"
    data: str = "*"
    defense: str = "*"
    knowledge: str = "*"
    eps: Number | None = None

    @pydantic.field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METRICS:
            near = near_matches(value, METRICS)
            raise ValueError(
                f"unknown metric '{value}'; "
                + (f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(METRICS)}")
            )
        return value

    @pydantic.model_validator(mode="after")
    def _one_bound(self) -> "GateRule":
        if (self.max is None) == (self.min is None):
            raise ValueError("a gate has either max or min")
        if self.attack == _WORST and self.metric not in _WORST_METRICS:
            raise ValueError(f"worst_case has {' and '.join(_WORST_METRICS)}, not {self.metric}")
        return self

    @property
    def title(self) -> str:
        """The rule as people read it."""
        return f"{self.metric} {self.bound}"

    @property
    def bound(self) -> str:
        """The threshold as people read it."""
        return f"<= {self.max:g}" if self.max is not None else f">= {self.min:g}"


class BaselineRule(_Frozen):
    """How much a rate may rise or fall against `--baseline`, on the same samples."""

    max_increase: dict[str, Number] = {}
    max_decrease: dict[str, Number] = {}

    @pydantic.field_validator("max_increase", "max_decrease")
    @classmethod
    def _paired(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in EVENTS:
                raise ValueError(f"'{name}' cannot be compared sample by sample; choose from {', '.join(EVENTS)}")
        return value


class ReliabilityRule(_Frozen):
    """Levels of findings that make the evaluation unreliable."""

    fail_on: tuple[Level, ...] = ("error",)


class Policy(_Frozen):
    """A gate policy. `inconclusive` says what an interval that straddles its threshold counts as (`point`: ignore
    the interval)."""

    inconclusive: Literal["fail", "pass", "point"] = "fail"
    gate: tuple[GateRule, ...] = ()
    baseline: BaselineRule | None = None
    reliability: Annotated[ReliabilityRule, Field(default_factory=ReliabilityRule)]

    @pydantic.model_validator(mode="after")
    def _something_to_judge(self) -> "Policy":
        if not self.gate and self.baseline is None:
            raise ValueError("the policy holds no gate; add [[gate]] or [baseline]")
        return self


def load_policy(path: Path) -> Policy:
    """The policy in a TOML file.

    Raises:
        ConfigError: Malformed, unknown metric, contradiction; names file, line and key.
    """
    return read_toml(path, Policy)


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
    """
    if not report.cells:
        raise NothingEvaluatedError("the run holds no cell, so there is nothing to judge")
    verdicts: list[GateVerdict] = []
    for number, rule in enumerate(policy.gate, start=1):
        entries = _select(rule, report)
        if not entries:
            raise ConfigError(f"gate {number} ({rule.title}): {_why_nothing(rule, report.cells)}")
        verdicts += [_judge(rule, label, measured, n, errors) for label, measured, n, errors in entries]
    if policy.baseline is not None:
        if baseline is None or run is None:
            raise ConfigError("the policy has a [baseline]; name the run to compare with: --baseline RUN")
        verdicts += _judge_baseline(policy.baseline, report, run, baseline)
    return tuple(_resolve(v, policy.inconclusive) for v in verdicts)


def decide(
    report: Report, verdicts: Sequence[GateVerdict] | None, *, fail_on: Sequence[Level], strict: bool = False
) -> Decision:
    """The exit code of a finished run and the sentence that says the same.

    Args:
        report: The result.
        verdicts: Of the policy; None when there is none.
        fail_on: Finding levels that make it unreliable, when there is a policy.
        strict: Whether findings of level error count without a policy too.
    """
    levels = {*(fail_on if verdicts is not None else ()), *(("error",) if strict else ())}
    doubts = [f for f in report.findings if f.level in levels]
    errors = sum(cell.n_errors for cell in report.cells)
    judged = sum(cell.n - cell.n_errors for cell in report.cells)
    if report.status == "incomplete":
        return Decision(exit_code=3, answer="unknown", reason="the run is incomplete")
    if not judged:
        return Decision(exit_code=3 if errors else 5, answer="unknown", reason="no sample could be judged")
    if errors:
        total = errors + judged
        return Decision(exit_code=3, answer="unknown", reason=f"{errors} of {total} judgements ended in an error")
    failed = [v for v in verdicts or () if v.verdict != "pass"]
    if failed:
        first = failed[0]
        return Decision(
            exit_code=1,
            answer="no",
            reason=f"{len(failed)} of {len(verdicts or ())} gates failed, first: {first.message}",
        )
    if doubts:
        first_doubt = doubts[0]
        reason = f"the evaluation is unreliable: {len(doubts)} findings, first {first_doubt.id}: {first_doubt.message}"
        return Decision(exit_code=4, answer="unknown", reason=reason)
    if verdicts is not None:
        return Decision(exit_code=0, answer="yes", reason=f"all {len(verdicts)} gates held")
    return Decision(exit_code=0, answer="unjudged", reason="no gate policy was given")


def check_policy(policy: Policy, cells: Sequence[Cell], *, controls: Set[str], has_baseline: bool) -> None:
    """Refuses, before anything runs, a policy that could not be judged on the planned `cells`.

    Raises:
        ConfigError: A gate selects no cell, or a [baseline] has no run to compare with.
    """
    if policy.baseline is not None and not has_baseline:
        raise ConfigError("the policy has a [baseline]; name the run to compare with: --baseline RUN")
    for number, rule in enumerate(policy.gate, start=1):
        if not any(_fits(rule, c) and _aims(rule, c.attack, control=c.attack in controls) for c in cells):
            raise ConfigError(f"gate {number} ({rule.title}): {_why_nothing(rule, cells)}")


def _select(rule: GateRule, report: Report) -> list[tuple[str, Measure, int, int]]:
    """(label, measured, denominator, errors) of everything the rule selects."""
    if rule.attack == _WORST:
        return [
            (_label(w), w.asr if rule.metric == "asr" else w.robust_accuracy, _denominator(rule.metric, w), w.n_errors)
            for w in report.worst_case
            if _fits(rule, w)
        ]
    return [
        (cell.id, cell.metrics[rule.metric], _denominator(rule.metric, cell), cell.n_errors)
        for cell in report.cells
        if _fits(rule, cell) and _aims(rule, cell.attack, control=cell.control) and rule.metric in cell.metrics
    ]


def _aims(rule: GateRule, attack: str, *, control: bool) -> bool:
    """Whether a rule is about this attack; a control is meant only where it is named."""
    if rule.attack == _WORST:
        return True
    return fnmatch.fnmatchcase(attack, rule.attack) and (not control or rule.attack == attack)


def _fits(rule: GateRule, entry: CellResult | WorstCase | Cell) -> bool:
    if rule.eps is not None and abs(entry.threat.eps - rule.eps) > 1e-9:
        return False
    return all(
        fnmatch.fnmatchcase(getattr(entry, name), getattr(rule, name))
        for name in _PATTERNS
        if not (name == "knowledge" and isinstance(entry, WorstCase))
    )


def _label(worst: WorstCase) -> str:
    threat = f"{worst.threat.norm} eps={worst.threat.eps:.4g}"
    return f"{worst.encoder} | {worst.head} | {worst.data} | {worst.defense} | {_WORST} | {threat}"


def _denominator(metric: str, entry: CellResult | WorstCase) -> int:
    return entry.n_clean_correct if metric in ("asr", "asr_8bit") else entry.n


def _why_nothing(rule: GateRule, cells: Sequence[CellResult | Cell]) -> str:
    """Which pattern selects nothing, with near matches."""
    names: dict[str, set[str]] = {name: {getattr(cell, name) for cell in cells} for name in _PATTERNS}
    names["attack"] = {cell.attack for cell in cells} | {_WORST}
    for name, known in names.items():
        pattern = getattr(rule, name)
        if not any(fnmatch.fnmatchcase(value, pattern) for value in known):
            near = near_matches(pattern, known)
            hint = f"did you mean {near[0]}?" if near else f"the run has {', '.join(sorted(known))}"
            return f"no cell has {name} = '{pattern}'; {hint}"
    return "no cell matches all of its patterns together"


def _judge(rule: GateRule, label: str, measured: Measure, n: int, errors: int) -> GateVerdict:
    def verdict(kind: Literal["pass", "fail", "inconclusive", "error"], why: str) -> GateVerdict:
        return GateVerdict(
            gate=rule.title,
            metric=rule.metric,
            bound=rule.bound,
            cell=label,
            verdict=kind,
            value=measured.value,
            low=measured.low,
            high=measured.high,
            message=f"{label}: {why}",
        )

    if measured.value is None:
        return verdict("error", f"{rule.metric} was not measured")
    if errors:
        return verdict("error", f"{errors} samples ended in an error, so {rule.title} cannot be judged")
    shown = f"{rule.metric} {_shown(measured)}"
    threshold = rule.max if rule.max is not None else rule.min
    assert threshold is not None
    low = measured.value if measured.low is None else measured.low
    high = measured.value if measured.high is None else measured.high
    if rule.min is not None:
        clears, violates = low >= threshold, high < threshold
    else:
        clears, violates = high <= threshold, low > threshold
    if clears:
        return verdict("pass", f"{shown} {rule.bound}")
    if violates:
        return verdict("fail", f"{shown} violates {rule.bound}")
    needed = samples_to_decide(round(measured.value * n), n, threshold)
    hint = f"about {needed} samples would decide" if needed else "no number of samples would decide at this rate"
    return verdict("inconclusive", f"{shown} straddles {rule.bound}; {hint}")


def _resolve(verdict: GateVerdict, inconclusive: str) -> GateVerdict:
    """What an inconclusive verdict counts as under the policy; the message keeps saying what was seen."""
    if verdict.verdict != "inconclusive" or inconclusive == "fail":
        return verdict
    if inconclusive == "pass":
        return verdict.model_copy(update={"verdict": "pass", "message": f"{verdict.message} (counts as passed)"})
    assert verdict.value is not None
    threshold = float(verdict.bound.split()[1])
    held = verdict.value <= threshold if verdict.bound.startswith("<=") else verdict.value >= threshold
    return verdict.model_copy(
        update={"verdict": "pass" if held else "fail", "message": f"{verdict.message} (judged by the point)"}
    )


def _judge_baseline(rule: BaselineRule, report: Report, run: Path, baseline: Path) -> list[GateVerdict]:
    mine, theirs = rows_by_cell(run), rows_by_cell(baseline)
    verdicts = []
    limits = [(n, v, 1) for n, v in rule.max_increase.items()] + [(n, v, -1) for n, v in rule.max_decrease.items()]
    for cell in report.cells:
        if cell.id not in theirs or cell.control:
            continue
        for metric, limit, direction in limits:
            verdicts.append(_judge_change(cell, metric, limit, direction, mine[cell.id], theirs[cell.id]))
    if not verdicts:
        raise ConfigError(f"--baseline {baseline}: it shares no cell with this run")
    return verdicts


def _judge_change(cell: CellResult, metric: str, limit: float, direction: int, mine: Rows, theirs: Rows) -> GateVerdict:
    pairs = discordant(metric, mine, theirs, cell.id)
    n = pairs.pairs
    change = paired_difference(pairs.only_theirs, pairs.only_mine, n)
    word = "increase" if direction > 0 else "decrease"
    bound = f"<= {limit:g}"
    title = f"{metric} {word} {bound}"

    def verdict(kind: Literal["pass", "fail", "inconclusive", "error"], why: str) -> GateVerdict:
        low, high = (change.low, change.high) if direction > 0 else (_minus(change.high), _minus(change.low))
        value = change.value if direction > 0 else _minus(change.value)
        return GateVerdict(
            gate=title,
            metric=metric,
            bound=bound,
            cell=cell.id,
            verdict=kind,
            value=value,
            low=low,
            high=high,
            message=f"{cell.id}: {why}",
        )

    if change.value is None or change.low is None or change.high is None:
        return verdict("error", f"{metric} cannot be compared: no sample was judged in both runs")
    low, high = (change.low, change.high) if direction > 0 else (-change.high, -change.low)
    shown = f"{metric} {word} {direction * change.value:+.3f} [{low:+.3f}, {high:+.3f}] on {n} paired samples"
    if high <= limit:
        return verdict("pass", f"{shown} {bound}")
    if low > limit:
        return verdict("fail", f"{shown} violates {bound}")
    return verdict("inconclusive", f"{shown} straddles {bound}")


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _shown(measured: Measure) -> str:
    if measured.low is None or measured.high is None:
        return f"{measured.value:.4g}"
    return f"{measured.value:.3f} [{measured.low:.3f}, {measured.high:.3f}]"
