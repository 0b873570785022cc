"""Gates against interval logic written out, and the rule that decides what a run comes to."""

import itertools
import math
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_runs import cell, report, row, store, worst
from robustbench_x.config import default_config
from robustbench_x.errors import ConfigError, NothingEvaluatedError, RunError, UsageError
from robustbench_x.gate import check_policy, decide, judge_gates
from robustbench_x.plan import make_plan
from robustbench_x.policy import Policy
from robustbench_x.registry import load_registry
from robustbench_x.report.words import headline
from robustbench_x.result import CellResult, Finding, GateVerdict, Measure, Report
from robustbench_x.stats import paired_difference

RATES = st.floats(0, 1)
Inconclusive = Literal["fail", "pass", "point"]


def policy(*gates: dict[str, Any], **more: Any) -> Policy:
    return Policy.model_validate({"gate": gates, **more})


def judge(made: Report, *gates: dict[str, Any], **more: Any) -> tuple[GateVerdict, ...]:
    return judge_gates(made, policy(*gates, **more))


def reference(low: float, value: float, high: float, side: str, limit: float, inconclusive: str) -> tuple[str, bool]:
    """(what was seen, whether it passes), case by case."""
    if side == "max":
        if low <= limit and high <= limit:
            return "pass", True
        if low > limit and high > limit:
            return "fail", False
        point = not value > limit
    else:
        if low >= limit and high >= limit:
            return "pass", True
        if low < limit and high < limit:
            return "fail", False
        point = not value < limit
    return "inconclusive", {"fail": False, "pass": True, "point": point}[inconclusive]


@settings(max_examples=300, deadline=None)
@given(
    ends=st.lists(RATES, min_size=3, max_size=3).map(sorted),
    limit=RATES,
    side=st.sampled_from(["max", "min"]),
    inconclusive=st.sampled_from(["fail", "pass", "point"]),
    touch=st.sampled_from([None, 0, 1, 2]),
)
def test_a_gate_agrees_with_interval_logic(
    ends: list[float], limit: float, side: str, inconclusive: Inconclusive, touch: int | None
) -> None:
    low, value, high = ends
    limit = limit if touch is None else ends[touch]
    made = report(cell(measures={"asr": Measure(value=value, low=low, high=high)}))
    (verdict,) = judge(made, {"metric": "asr", side: limit}, inconclusive=inconclusive)
    seen, passes = reference(low, value, high, side, limit, inconclusive)
    assert (verdict.verdict == "pass") == passes
    if seen != "inconclusive":
        assert verdict.verdict == seen
    elif inconclusive == "fail":
        assert verdict.verdict == "inconclusive"
    assert verdict.message.count("\n") == 0


def test_a_threshold_is_compared_in_full_not_as_it_is_printed() -> None:
    made = report(cell(measures={"asr": Measure(value=0.1234568, low=0.1, high=0.2)}))
    (verdict,) = judge(made, {"metric": "asr", "max": 0.1234567}, inconclusive="point")
    assert verdict.verdict == "fail"


def test_a_mean_has_no_interval_and_is_judged_by_its_value() -> None:
    made = report(cell(measures={"l2_mean": Measure(value=2.0)}))
    assert judge(made, {"metric": "l2_mean", "max": 2})[0].verdict == "pass"
    assert judge(made, {"metric": "l2_mean", "max": 1.99})[0].verdict == "fail"
    assert judge(made, {"metric": "l2_mean", "min": 2.01})[0].verdict == "fail"


def test_an_inconclusive_gate_says_what_would_decide_it() -> None:
    (verdict,) = judge(report(cell(hits={"asr": (5, 20)})), {"metric": "asr", "max": 0.3})
    assert verdict.verdict == "inconclusive"
    assert re.search(r"; about \d+ samples would decide$", verdict.message)
    (verdict,) = judge(report(cell(hits={"asr": (6, 20)})), {"metric": "asr", "max": 0.3})
    assert "no number of samples would decide" in verdict.message


@pytest.mark.parametrize("inconclusive", ["fail", "pass", "point"])
@pytest.mark.parametrize("measured", [Measure(value=None), Measure(value=math.nan, low=0.0, high=0.0), None])
def test_what_was_not_measured_never_passes(inconclusive: str, measured: Measure | None) -> None:
    made = report(cell(measures={} if measured is None else {"targeted_success": measured}))
    (verdict,) = judge(made, {"metric": "targeted_success", "max": 1}, inconclusive=inconclusive)
    assert (verdict.verdict, verdict.message) == ("error", "targeted_success was not measured")


@pytest.mark.parametrize("inconclusive", ["fail", "pass", "point"])
@pytest.mark.parametrize("attack", ["pgd", "worst_case"])
def test_a_cell_with_error_rows_never_passes(inconclusive: str, attack: str) -> None:
    broken = cell(errors=1)
    made = report(broken, worst_case=[worst((0, 99), errors=1)])
    verdicts = judge(made, {"metric": "asr", "max": 1, "attack": attack}, inconclusive=inconclusive)
    assert [v.verdict for v in verdicts] == ["error"]
    assert "ended in an error" in verdicts[0].message
    assert decide(made, verdicts, fail_on=()).exit_code == 3


MATRIX = [
    cell(attack, encoder=encoder, defense=defense, knowledge=knowledge, eps=eps, control=attack == "noise")
    for encoder in ("timm:a", "python:b:c")
    for attack in ("noise", "pgd", "apgd_ce", "pgd[50]")
    for defense, knowledge in (("none", "none"), ("jpeg", "bpda"), ("jpeg", "full"))
    for eps in (4 / 255, 8 / 255)
]


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ({}, lambda c: not c.control),
        ({"attack": "apgd*"}, lambda c: c.attack == "apgd_ce"),
        ({"attack": "noise"}, lambda c: c.attack == "noise"),
        ({"attack": "pgd[50]"}, lambda c: c.attack == "pgd[50]"),
        ({"encoder": "timm:*"}, lambda c: c.encoder == "timm:a" and not c.control),
        ({"defense": "jpeg", "knowledge": "bpda"}, lambda c: c.knowledge == "bpda" and not c.control),
        ({"eps": "8/255"}, lambda c: c.threat.eps == 8 / 255 and not c.control),
        ({"eps": "4/255", "attack": "pgd"}, lambda c: c.threat.eps == 4 / 255 and c.attack == "pgd"),
    ],
)
def test_patterns_select_cells(patterns: dict[str, str], chosen: Any) -> None:
    verdicts = judge(report(*MATRIX), {"metric": "asr", "max": 0.5, **patterns})
    assert [v.cell for v in verdicts] == [c.id for c in MATRIX if chosen(c)]


def test_the_worst_case_is_judged_by_its_own_figures() -> None:
    victims = {(c.encoder, c.defense, c.threat.eps): c for c in MATRIX}
    made = report(*MATRIX, worst_case=[worst((90, 100), like=c) for c in victims.values()])
    verdicts = judge(made, {"metric": "asr", "max": 0.5, "attack": "worst_case", "eps": "4/255", "defense": "jpeg"})
    assert [v.verdict for v in verdicts] == ["fail", "fail"]
    assert all("| jpeg | worst_case | linf 4/255" in v.cell for v in verdicts)
    verdicts = judge(made, {"metric": "robust_accuracy", "min": 0.05, "attack": "worst_case"})
    assert {v.value for v in verdicts} == {0.1}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"attack": "pgdd"}, r"gate 1 \(asr <= 0.5\): no cell has attack = 'pgdd'; did you mean pgd"),
        ({"head": "zz"}, r"no cell has head = 'zz'; the run has linear"),
        ({"eps": 8}, r"no cell has eps = 8; the run has 4/255, 8/255"),
        ({"attack": "noi*"}, r"selects controls only"),
        ({"defense": "none", "knowledge": "full"}, r"no cell matches all of its patterns together"),
    ],
)
def test_a_gate_that_selects_nothing_is_an_error(patterns: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judge(report(*MATRIX), {"metric": "asr", "max": 0.5, **patterns})


def test_a_policy_is_refused_before_anything_runs() -> None:
    registry, config = load_registry(), default_config()
    cells = make_plan(config, registry).cells
    check_policy(
        policy({"metric": "asr", "max": 0.5, "attack": "worst_case"}), cells, controls={"noise"}, has_baseline=False
    )
    with pytest.raises(ConfigError, match=r"no cell has attack = 'pgdd'; did you mean pgd\?"):
        check_policy(
            policy({"metric": "asr", "max": 0.5, "attack": "pgdd"}), cells, controls={"noise"}, has_baseline=False
        )
    with pytest.raises(ConfigError, match=r"has a \[baseline\]; name the run"):
        check_policy(policy(baseline={"max_increase": {"asr": 0.1}}), cells, controls=set(), has_baseline=False)


def paired_rows(name: str, outcomes: list[tuple[bool, bool]]) -> list[dict[str, Any]]:
    """A row per (clean correct, fooled)."""
    return [
        row(name, i, clean=int(not right), adv=int(fooled or not right)) for i, (right, fooled) in enumerate(outcomes)
    ]


@settings(max_examples=40, deadline=None)
@given(
    samples=st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=40),
    limit=st.sampled_from([0.0, 0.02, 0.1, 0.3]),
    key=st.sampled_from(["max_increase", "max_decrease"]),
    metric=st.sampled_from(["asr", "robust_accuracy", "clean_accuracy"]),
)
def test_a_baseline_is_compared_sample_by_sample(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[bool, ...]], limit: float, key: str, metric: str
) -> None:
    folder = tmp_path_factory.mktemp("baseline")
    made = cell()
    before = [(a, b) for a, b, _, _ in samples]
    after = [(c, d) for _, _, c, d in samples]
    old = store(folder / "old", report(made), paired_rows(made.id, before))
    new = store(folder / "new", report(made), paired_rows(made.id, after))
    rule = policy(baseline={key: {metric: limit}})
    (verdict,) = judge_gates(report(made), rule, run=new, baseline=old)

    def event(right: bool, fooled: bool) -> bool | None:
        if metric == "asr":
            return (right and fooled) if right else None
        return right if metric == "clean_accuracy" else right and not fooled

    pairs = [(event(*x), event(*y)) for x, y in zip(before, after, strict=True)]
    counted = [(x, y) for x, y in pairs if x is not None and y is not None]
    rose = sum(bool(y) and not x for x, y in counted)
    fell = sum(bool(x) and not y for x, y in counted)
    if key == "max_decrease":
        rose, fell = fell, rose
    if not counted:
        assert verdict.verdict == "error"
        return
    expected = paired_difference(fell, rose, len(counted))
    assert expected.low is not None
    assert expected.high is not None
    assert verdict.value == pytest.approx((rose - fell) / len(counted))
    assert (verdict.low, verdict.high) == (expected.low, expected.high)
    wanted = "pass" if expected.high <= limit else "fail" if expected.low > limit else "inconclusive"
    assert verdict.verdict == wanted


def test_a_baseline_of_other_images_or_samples_is_refused(tmp_path: Path) -> None:
    made, rule = cell(), policy(baseline={"max_increase": {"asr": 0.1}})
    rows = paired_rows(made.id, [(True, False)] * 3)
    new = store(tmp_path / "new", report(made), rows)
    other = store(tmp_path / "other", report(made), [{**rows[0], "sha256": "x"}, *rows[1:]])
    other_rows = store(tmp_path / "fewer", report(made), rows[:2])
    stranger = store(tmp_path / "stranger", report(cell("fgsm")), paired_rows(cell("fgsm").id, [(True, False)]))
    with pytest.raises(RunError, match="different pixels"):
        judge_gates(report(made), rule, run=new, baseline=other)
    with pytest.raises(RunError, match="evaluated different samples"):
        judge_gates(report(made), rule, run=new, baseline=other_rows)
    with pytest.raises(ConfigError, match="shares no cell with this run"):
        judge_gates(report(made), rule, run=new, baseline=stranger)
    with pytest.raises(UsageError, match="there is no such run"):
        judge_gates(report(made), rule, run=new, baseline=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="name the run to compare with"):
        judge_gates(report(made), rule, run=new)


def test_error_rows_on_either_side_of_a_baseline_never_pass(tmp_path: Path) -> None:
    made, rule = cell(), policy(baseline={"max_increase": {"asr": 1.0}}, inconclusive="pass")
    rows = paired_rows(made.id, [(True, False)] * 50)
    broken = [{**rows[0], "error": "boom"}, *rows[1:]]
    good, bad = store(tmp_path / "good", report(made), rows), store(tmp_path / "bad", report(made), broken)
    for new, old in ((good, bad), (bad, good)):
        (verdict,) = judge_gates(report(made), rule, run=new, baseline=old)
        assert verdict.verdict == "error"
    assert judge_gates(report(made), rule, run=good, baseline=good)[0].verdict == "pass"


FINDINGS = [
    Finding(id="zero_gradient", level="error", message="m", cell=None),
    Finding(id="chance_head", level="warning", message="m", cell="c"),
    Finding(id="few_samples", level="note", message="m", cell="c"),
]


@st.composite
def reports(draw: st.DrawFn) -> Report:
    cells: list[CellResult] = []
    for number in range(draw(st.integers(0, 3))):
        n = draw(st.integers(0, 30))
        errors = draw(st.sampled_from([0, 0, 0, min(1, n), n]))
        cells.append(cell(f"a{number}", n=n, errors=errors, hits={"asr": (draw(st.integers(0, n)), n)}))
    status = draw(st.sampled_from([None, None, "complete", "incomplete", "error"]))
    return report(*cells, findings=draw(st.lists(st.sampled_from(FINDINGS), max_size=2)), status=status)


@settings(max_examples=300, deadline=None)
@given(
    made=reports(),
    limit=RATES,
    inconclusive=st.sampled_from(["fail", "pass", "point"]),
    fail_on=st.sets(st.sampled_from(["error", "warning", "note"])),
    strict=st.booleans(),
    judged=st.booleans(),
)
def test_the_printed_answer_the_exit_code_and_the_gates_agree(
    made: Report, limit: float, inconclusive: str, fail_on: set[Any], strict: bool, judged: bool
) -> None:
    verdicts = None
    if judged:
        if not made.cells:
            with pytest.raises(NothingEvaluatedError, match="nothing to judge"):
                judge(made, {"metric": "asr", "max": limit})
            return
        verdicts = judge(made, {"metric": "asr", "max": limit}, inconclusive=inconclusive)
    decision = decide(made, verdicts, fail_on=sorted(fail_on), strict=strict)

    n = sum(c.n for c in made.cells)
    errors = any(c.n_errors for c in made.cells) or made.status == "error"
    failed = any(v.verdict != "pass" for v in verdicts or ())
    levels = {f.level for f in made.findings}
    doubted = bool(judged and levels & fail_on) or (strict and "error" in levels)
    cases = [(n == 0, 5), (made.status == "incomplete" or errors, 3), (failed, 1), (doubted, 4), (True, 0)]
    assert decision.exit_code == next(code for holds, code in cases if holds)

    answers = {0: {"yes", "unjudged"}, 1: {"no"}, 3: {"unknown"}, 4: {"unknown"}, 5: {"unknown"}}
    assert decision.answer in answers[decision.exit_code]
    assert (decision.answer == "yes") == (decision.exit_code == 0 and judged)
    line = headline(decision)
    assert line.endswith(f"(exit code {decision.exit_code})")
    word = {"yes": "YES", "no": "NO", "unknown": "UNKNOWN", "unjudged": "NOT JUDGED"}[decision.answer]
    assert line.startswith(f"Safe to ship? {word}: ")


def test_every_exit_code_has_its_place_in_the_order() -> None:
    gates = {"metric": "asr", "max": 0.1}
    good, bad = cell(hits={"asr": (0, 100)}), cell(hits={"asr": (90, 100)})
    doubt = FINDINGS[:1]
    ladder = [
        (report(good), 0, "yes"),
        (report(good, findings=doubt), 4, "unknown"),
        (report(bad, findings=doubt), 1, "no"),
        (report(bad, cell("b", errors=2), findings=doubt), 3, "unknown"),
        (report(bad, findings=doubt, status="incomplete"), 3, "unknown"),
        (report(cell(n=0), findings=doubt, status="incomplete"), 5, "unknown"),
    ]
    for made, code, answer in ladder:
        decision = decide(made, judge(made, gates), fail_on=("error",))
        assert (decision.exit_code, decision.answer) == (code, answer)
    assert decide(report(bad), None, fail_on=()).answer == "unjudged"
    assert len({code for _, code, _ in ladder}) == 5
    assert all(code != 2 for code in itertools.chain(c for _, c, _ in ladder))
