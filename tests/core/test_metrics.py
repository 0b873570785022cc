"""Every metric against a slow reference that walks the samples one by one."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2
from sklearn.metrics import accuracy_score, roc_auc_score

from robustbench_x.metrics import METRICS, Outcome, compute, worst_case
from robustbench_x.stats import Interval, wilson

_MEANS = ("linf", "l2", "ssim", "feature_cosine", "forwards", "backwards", "seconds")
_OPTIONAL = {name for name, info in METRICS.items() if name == "targeted_success" or info.task != "any"}


def _outcome(
    n: int,
    *,
    seed: int = 0,
    errors: float = 0.2,
    targets: float = 0.0,
    classes: int = 4,
    ranked: bool = False,
    watched: bool = False,
) -> Outcome:
    rng = np.random.default_rng(seed)
    error = rng.random(n) < errors
    label = rng.integers(0, classes, n)
    clean = np.where(rng.random(n) < 0.7, label, rng.integers(0, classes, n))
    adv = np.where(rng.random(n) < 0.4, clean, rng.integers(0, classes, n))
    adv8 = np.where(rng.random(n) < 0.8, adv, clean)
    target = np.where(rng.random(n) < targets, rng.integers(0, classes, n), -1)
    values: dict[str, Any] = {name: np.where(error, np.nan, rng.random(n)) for name in _MEANS}
    predictions = {"clean_pred": clean, "adv_pred": adv, "adv8_pred": adv8}
    values |= {name: np.where(error, -1, found) for name, found in predictions.items()}
    if ranked:
        # Precisions of exactly 0 and 1 among them, and places on both sides of 1 and of 10.
        found = {f"{side}_ap": np.clip(1.4 * rng.random(n) - 0.2, 0, 1) for side in ("clean", "adv")}
        found |= {f"{side}_rank": rng.choice([1.0, 2.0, 9.0, 10.0, 11.0, 400.0], n) for side in ("clean", "adv")}
        values["retrieval"] = {name: np.where(error, np.nan, numbers) for name, numbers in found.items()}
    if watched:
        # Exactly 0 among them, which is still accepted.
        found = {f"{side}_acceptance": rng.choice([-2.0, -0.5, 0.0, 0.5, 3.0], n) for side in ("clean", "adv", "adv8")}
        values["acceptance"] = {name: np.where(error, np.nan, numbers) for name, numbers in found.items()}
    return Outcome(label=label, error=error, target=target, **values)


def _perfect(n: int, **changes: Any) -> Outcome:
    """Every row judged, correct and untouched."""
    zeros = np.zeros(n, dtype=np.int64)
    values: dict[str, Any] = {name: np.zeros(n) for name in _MEANS}
    values |= {"label": zeros, "clean_pred": zeros, "adv_pred": zeros, "adv8_pred": zeros}
    values |= {"error": np.zeros(n, dtype=bool), "target": np.full(n, -1)}
    return Outcome(**(values | changes))


def _rate(pairs: list[bool]) -> Interval:
    return wilson(sum(pairs), len(pairs))


def _bounded_mean(values: list[float]) -> Interval:
    """The mean, and the t with n (mean - t)^2 = z^2 t (1 - t): the score test of a rate of that size."""
    n, mean, z2 = len(values), math.fsum(values) / len(values), float(chi2.ppf(0.95, 1))
    low, high = sorted(np.roots([n + z2, -(2 * n * mean + z2), n * mean * mean]).real.tolist())
    return Interval(value=mean, low=low, high=high)


def _reference(o: Outcome) -> dict[str, Interval]:
    optional = ("retrieval", "acceptance", "pairing", "spoken")
    arrays = {name: getattr(o, name) for name in Outcome.__dataclass_fields__ if name not in optional}
    arrays |= {**(o.retrieval or {}), **(o.acceptance or {})}
    rows = [{name: values[i].item() for name, values in arrays.items()} for i in range(len(o.label))]
    judged = [r for r in rows if not r["error"]]
    if not judged:
        names = set(METRICS) - _OPTIONAL
        names |= {"targeted_success"} if any(r["target"] >= 0 for r in rows) else set()
        names |= {m for m, info in METRICS.items() if info.task == "retrieval" and o.retrieval}
        names |= {m for m, info in METRICS.items() if info.task == "detector" and o.acceptance}
        return {name: Interval() for name in names}

    def let_in(row: dict[str, Any], side: str) -> bool:
        return bool(row.get(f"{side}_acceptance", 0.0) >= 0)

    def correct(row: dict[str, Any]) -> bool:
        return bool(row["clean_pred"] == row["label"]) and let_in(row, "clean")

    def passes(row: dict[str, Any], side: str) -> bool:
        return bool(row[f"{side}_pred"] != row["label"]) and let_in(row, side)

    right = [r for r in judged if correct(r)]
    counts = Counter(r["adv_pred"] for r in judged)
    collapse = min(k for k in counts if counts[k] == max(counts.values()))
    found = {
        "clean_accuracy": _rate([not r["error"] and correct(r) for r in rows]),
        "robust_accuracy": _rate([not r["error"] and correct(r) and not passes(r, "adv") for r in rows]),
        "asr": _rate([passes(r, "adv") for r in right]),
        "asr_total": _rate([passes(r, "adv") for r in judged]),
        "flip_rate": _rate([r["adv_pred"] != r["clean_pred"] and let_in(r, "adv") for r in judged]),
        "asr_8bit": _rate([passes(r, "adv8") for r in right]),
        "collapse_ceiling": _rate([r["clean_pred"] != collapse for r in judged]),
        "linf_max": Interval(value=max(r["linf"] for r in judged)),
    }
    if o.acceptance:
        scores = [-r["adv_acceptance"] for r in judged] + [-r["clean_acceptance"] for r in judged]
        found |= {
            "refused_clean": _rate([not let_in(r, "clean") for r in judged]),
            "refused": _rate([not let_in(r, "adv") for r in judged]),
            "detector_auroc": Interval(value=roc_auc_score([1] * len(judged) + [0] * len(judged), scores)),
        }
    if any(r["target"] >= 0 for r in rows):
        aimed = [r for r in judged if r["target"] >= 0]
        found["targeted_success"] = _rate([r["adv_pred"] == r["target"] and let_in(r, "adv") for r in aimed])
    if o.retrieval:
        found |= {
            "clean_map@10": _bounded_mean([r["clean_ap"] for r in judged]),
            "map@10": _bounded_mean([r["adv_ap"] for r in judged]),
            "clean_recall@1": _rate([r["clean_rank"] == 1 for r in judged]),
            "recall@1": _rate([r["adv_rank"] == 1 for r in judged]),
            "clean_recall@10": _rate([r["clean_rank"] in range(1, 11) for r in judged]),
            "recall@10": _rate([r["adv_rank"] in range(1, 11) for r in judged]),
        }
    for name, field in {
        "feature_cosine": "feature_cosine",
        "l2_mean": "l2",
        "ssim_mean": "ssim",
        "forwards_per_sample": "forwards",
        "backwards_per_sample": "backwards",
        "seconds": "seconds",
    }.items():
        found[name] = Interval(value=math.fsum(r[field] for r in judged) / len(judged))
    return found


def _assert_same(found: dict[str, Interval], expected: dict[str, Interval]) -> None:
    assert set(found) == set(expected)
    for name, interval in expected.items():
        for part in ("value", "low", "high"):
            assert getattr(found[name], part) == pytest.approx(getattr(interval, part), abs=1e-12), f"{name}.{part}"


@pytest.mark.parametrize("n", [1, 2, 3, 40, 300])
@pytest.mark.parametrize("errors", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("targets", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["plain", "ranked", "watched"])
def test_every_metric_equals_the_reference(n: int, errors: float, targets: float, kind: str) -> None:
    for seed in range(5):
        chosen = {} if kind == "plain" else {kind: True}
        outcome = _outcome(n, seed=seed, errors=errors, targets=targets, **chosen)
        _assert_same(compute(outcome), _reference(outcome))


def test_accuracies_equal_sklearn() -> None:
    o = _outcome(200, errors=0.0)
    found = compute(o)
    assert found["clean_accuracy"].value == pytest.approx(accuracy_score(o.label, o.clean_pred))
    assert found["asr_total"].value == pytest.approx(1 - accuracy_score(o.label, o.adv_pred))
    assert found["flip_rate"].value == pytest.approx(1 - accuracy_score(o.clean_pred, o.adv_pred))


def test_metrics_come_in_the_order_of_the_table() -> None:
    # Those of text are for victims that neither rank a gallery nor stand behind a detector.
    table = [name for name, info in METRICS.items() if info.task not in ("image_text", "entailment", "captioning")]
    assert list(compute(_outcome(20, targets=1.0, ranked=True, watched=True))) == table
    everything = compute(_outcome(20, ranked=True, watched=True))
    assert list(everything) == [name for name in table if name != "targeted_success"]
    assert list(compute(_outcome(20))) == [name for name in METRICS if name not in _OPTIONAL]
    assert all(info.name == name for name, info in METRICS.items())


def test_only_what_ranks_has_retrieval_metrics() -> None:
    ranked, plain = _outcome(20, ranked=True), _outcome(20)
    extra = {name for name, info in METRICS.items() if info.task == "retrieval"}
    assert len(extra) == 6
    assert set(compute(ranked)) - set(compute(plain)) == extra
    assert all(METRICS[name].is_rate and METRICS[name].higher_is_better for name in extra)
    everything = compute(ranked)
    _assert_same({name: everything[name] for name in compute(plain)}, compute(replace(ranked, retrieval=None)))


def test_what_a_detector_refuses_fools_nobody_and_is_not_correct() -> None:
    wrong = np.ones(4, dtype=np.int64)
    acceptance = {
        "clean_acceptance": np.array([1.0, 1.0, -1.0, 0.0]),
        "adv_acceptance": np.array([1.0, -1.0, 1.0, -1e-9]),
        "adv8_acceptance": np.array([-1.0, -1.0, 1.0, 1.0]),
    }
    o = _perfect(4, adv_pred=wrong, adv8_pred=wrong, acceptance=acceptance)
    found = compute(o)
    assert found["clean_accuracy"] == wilson(3, 4)
    assert found["asr"] == wilson(1, 3)
    assert found["robust_accuracy"] == wilson(2, 4)
    assert found["asr_8bit"] == wilson(1, 3)
    assert found["asr_total"] == wilson(2, 4)
    assert found["refused_clean"] == wilson(1, 4)
    assert found["refused"] == wilson(2, 4)
    assert worst_case([o])["robust_accuracy"] == wilson(2, 4)


def test_a_perfect_and_a_lost_ranking() -> None:
    four = np.ones(4)
    retrieval = {"clean_ap": four, "clean_rank": four, "adv_ap": 0 * four, "adv_rank": 11 * four}
    found = compute(_perfect(4, retrieval=retrieval))
    for name in ("map@10", "recall@1", "recall@10"):
        assert found[f"clean_{name}"] == wilson(4, 4)
        assert found[name] == wilson(0, 4)


def test_only_rates_have_intervals() -> None:
    for name, interval in compute(_outcome(50, targets=1.0, ranked=True)).items():
        assert interval.value is not None
        assert (interval.low is not None) == METRICS[name].is_rate, name


def test_an_error_row_is_never_robust() -> None:
    error = np.array([False, True])
    found = compute(_perfect(2, error=error))
    assert found["robust_accuracy"].value == 0.5
    assert found["clean_accuracy"].value == 0.5
    assert found["asr"] == wilson(0, 1)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_judged_is_nothing_measured(n: int) -> None:
    found = compute(_perfect(n, error=np.ones(n, dtype=bool)))
    assert set(found.values()) == {Interval()}


def test_without_a_correct_sample_there_is_no_asr() -> None:
    found = compute(_perfect(3, label=np.ones(3, dtype=np.int64)))
    assert found["asr"] == found["asr_8bit"] == Interval()
    assert found["robust_accuracy"] == found["clean_accuracy"] == wilson(0, 3)


def test_a_number_nobody_measured_is_not_averaged_away() -> None:
    found = compute(_perfect(3, ssim=np.array([1.0, np.nan, 1.0]), linf=np.array([np.nan, 0.0, 0.0])))
    assert found["ssim_mean"] == found["linf_max"] == Interval()
    assert found["l2_mean"].value == 0.0


def test_an_empty_cell_has_no_targets() -> None:
    assert "targeted_success" not in compute(_perfect(0))


def test_arrays_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"linf has shape \(2,\), expected \(3,\)"):
        _perfect(3, linf=np.zeros(2))


def test_error_flags_are_boolean() -> None:
    with pytest.raises(ValueError, match="error must be boolean"):
        _perfect(3, error=np.zeros(3, dtype=np.int64))


@pytest.mark.parametrize("name", ["label", "clean_pred", "adv_pred", "adv8_pred"])
def test_a_judged_row_holds_its_predictions(name: str) -> None:
    with pytest.raises(ValueError, match=f"1 judged rows have no {name}"):
        _perfect(2, **{name: np.array([0, -1])})


def _reference_worst_case(outcomes: list[Outcome]) -> dict[str, Interval]:
    robust, decided = [], []
    for i, label in enumerate(outcomes[0].label.tolist()):
        rows = [(bool(o.error[i]), int(o.clean_pred[i]), int(o.adv_pred[i])) for o in outcomes]
        judged = [row for row in rows if not row[0]]
        fooled = any(clean == label and adv != label for _, clean, adv in judged)
        survived = len(judged) == len(rows) and all(clean == label and adv == label for _, clean, adv in judged)
        robust.append(survived)
        if fooled or survived:
            decided.append(fooled)
    if all(o.error.all() for o in outcomes):
        return {"robust_accuracy": Interval(), "asr": Interval()}
    return {"robust_accuracy": _rate(robust), "asr": _rate(decided)}


def _rival(outcome: Outcome, seed: int, errors: float) -> Outcome:
    """Another attack on the same samples of the same victim."""
    other = _outcome(len(outcome), seed=seed, errors=errors)
    clean = np.where(outcome.error, outcome.label, outcome.clean_pred)
    return replace(other, label=outcome.label, clean_pred=clean)


@pytest.mark.parametrize("errors", [0.0, 0.2, 1.0])
def test_worst_case_equals_the_reference(errors: float) -> None:
    for seed in range(10):
        first = _outcome(40, seed=seed, errors=errors)
        outcomes = [first, *(_rival(first, 100 * k + seed, errors) for k in (1, 2))]
        _assert_same(worst_case(outcomes), _reference_worst_case(outcomes))


def test_the_worst_case_of_one_attack_is_that_attack() -> None:
    outcome = _outcome(60)
    alone = compute(outcome)
    assert worst_case([outcome]) == {name: alone[name] for name in ("robust_accuracy", "asr")}


def test_a_failed_attack_leaves_a_sample_unknown_unless_another_fooled_it() -> None:
    fooled = _perfect(3, adv_pred=np.array([1, 0, 0]))
    failed = _perfect(3, error=np.array([True, True, False]))
    found = worst_case([fooled, failed])
    assert found["robust_accuracy"] == wilson(1, 3)
    assert found["asr"] == wilson(1, 2)


def test_the_worst_case_is_no_better_than_any_attack() -> None:
    first = _outcome(80, errors=0.1)
    outcomes = [first, _rival(first, 7, 0.1)]
    value = worst_case(outcomes)["robust_accuracy"].value
    assert value is not None
    assert all(value <= (compute(o)["robust_accuracy"].value or 0.0) for o in outcomes)


def test_the_worst_case_needs_the_same_samples() -> None:
    with pytest.raises(ValueError, match="labels differ"):
        worst_case([_perfect(3), _perfect(4)])
    with pytest.raises(ValueError, match="labels differ"):
        worst_case([_perfect(3), _perfect(3, label=np.array([0, 1, 0]))])
    with pytest.raises(ValueError, match="at least one attack"):
        worst_case([])
