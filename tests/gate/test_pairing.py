"""Two runs side by side: matched by what was measured, compared sample by sample, refused when they are not alike."""

from pathlib import Path

import pytest

from made_runs import cell, report, row, store
from robustbench_x.compare import compare_runs
from robustbench_x.errors import ConfigError, UsageError
from robustbench_x.gate import judge_gates
from robustbench_x.policy import Policy
from robustbench_x.stats import mcnemar_exact, paired_difference


def _run(path: Path, encoder: str, fooled: list[bool], *, steps: int = 10) -> Path:
    made = cell(encoder=encoder).model_copy(update={"params": {"steps": steps}})
    rows = [row(made.id, i, adv=1 if hit else 0) for i, hit in enumerate(fooled)]
    return store(path, report(made), rows)


OLD = [True] * 5 + [False] * 35
NEW = [True] * 3 + [False] * 2 + [True] * 20 + [False] * 15


def test_a_change_is_counted_sample_by_sample(tmp_path: Path) -> None:
    a, b = _run(tmp_path / "a", "toy:one", OLD), _run(tmp_path / "b", "toy:one", NEW)
    (change,) = compare_runs(a, b, "asr")
    lost = sum(o and not n for o, n in zip(OLD, NEW, strict=True))
    gained = sum(n and not o for o, n in zip(OLD, NEW, strict=True))
    interval = paired_difference(lost, gained, 40)
    assert (change.pairs, change.before, change.after) == (40, 5 / 40, 23 / 40)
    assert (change.change, change.low, change.high) == (interval.value, interval.low, interval.high)
    assert change.p == mcnemar_exact(lost, gained)
    assert change.verdict == "worse"
    assert compare_runs(b, a, "asr")[0].verdict == "better"
    assert compare_runs(a, b, "robust_accuracy")[0].verdict == "worse"
    assert compare_runs(a, a, "asr")[0].verdict == "cannot be told"


def test_a_new_checkpoint_is_compared_with_the_old_one(tmp_path: Path) -> None:
    old, new = _run(tmp_path / "a", "timm:x@v1", OLD), _run(tmp_path / "b", "timm:x@v2", NEW)
    assert compare_runs(old, new, "asr")[0].verdict == "worse"
    policy = Policy.model_validate({"baseline": {"max_increase": {"asr": 0.02}}})
    from robustbench_x.result import read_report

    (verdict,) = judge_gates(read_report(new), policy, run=new, baseline=old)
    assert verdict.verdict == "fail"
    assert "timm:x@v2" in verdict.cell


def test_several_encoders_are_matched_by_name(tmp_path: Path) -> None:
    both = [cell(encoder="toy:one"), cell(encoder="toy:two")]
    rows = [row(made.id, i) for made in both for i in range(4)]
    pair = store(tmp_path / "pair", report(*both), rows)
    other = _run(tmp_path / "other", "toy:three", [False] * 4)
    with pytest.raises(UsageError, match="share no cell"):
        compare_runs(pair, other, "asr")


def test_other_parameters_are_not_comparable(tmp_path: Path) -> None:
    a, b = _run(tmp_path / "a", "toy:one", OLD), _run(tmp_path / "b", "toy:one", OLD, steps=50)
    with pytest.raises(UsageError, match=r"pgd ran with another steps in the two runs \(50 and 10\)"):
        compare_runs(a, b, "asr")


def test_an_unpaired_metric_names_near_matches(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'asr_8bits' cannot be compared sample by sample; did you mean asr_8bit"):
        compare_runs(tmp_path, tmp_path, "asr_8bits")


def test_leaving_an_attack_out_is_no_improvement(tmp_path: Path) -> None:
    from robustbench_x.result import read_report

    weak, strong = cell("embed"), cell("pgd")
    rows = [row(made.id, i) for made in (weak, strong) for i in range(50)]
    old = store(tmp_path / "old", report(weak, strong), rows)
    new = store(tmp_path / "new", report(weak), [r for r in rows if r["cell"] == weak.id])
    policy = Policy.model_validate({"inconclusive": "point", "baseline": {"max_increase": {"asr": 0.02}}})
    verdicts = judge_gates(read_report(new), policy, run=new, baseline=old)
    assert {v.cell: v.verdict for v in verdicts} == {weak.id: "pass", strong.id: "error"}
    assert "this run did not" in verdicts[1].message
