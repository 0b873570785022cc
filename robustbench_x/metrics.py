"""From per-sample records to the numbers of a report.

A rate carries a Wilson interval; a mean has none. A sample that could not be judged is never robust and never
fooled: it stays in the denominator of the accuracies and leaves every other one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from robustbench_x.imagetext.metrics import CAPTIONING_METRICS, ENTAILMENT_METRICS, IMAGE_TEXT_METRICS, Pairing, Spoken
from robustbench_x.stats import Interval, bounded_mean, wilson

__all__ = ["METRICS", "RECALLS", "MetricInfo", "Outcome", "compute", "most_frequent", "worst_case"]

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """What a gate, a table or a reader must know about a metric.

    `higher_is_better` is the defender's view; None where the number only describes the attack. A rate lies in
    [0, 1] and carries an interval. `task` names the only kind of victim it is measured on.
    """

    name: str
    higher_is_better: bool | None
    is_rate: bool
    help: str
    task: str = "any"


def _table(*entries: MetricInfo) -> dict[str, MetricInfo]:
    return {entry.name: entry for entry in entries}


def _rate(name: str, higher_is_better: bool | None, text: str) -> MetricInfo:
    return MetricInfo(name=name, higher_is_better=higher_is_better, is_rate=True, help=text)


def _mean(name: str, higher_is_better: bool | None, text: str) -> MetricInfo:
    return MetricInfo(name=name, higher_is_better=higher_is_better, is_rate=False, help=text)


def _detector(name: str, higher_is_better: bool | None, is_rate: bool, text: str) -> MetricInfo:
    return MetricInfo(name=name, higher_is_better=higher_is_better, is_rate=is_rate, help=text, task="detector")


def _retrieval(name: str, text: str) -> MetricInfo:
    return MetricInfo(name=name, higher_is_better=True, is_rate=True, help=text, task="retrieval")


def _of_texts(task: str, described: Mapping[str, tuple[str, bool]]) -> tuple[MetricInfo, ...]:
    return tuple(
        MetricInfo(name=name, higher_is_better=not name.startswith("target_"), is_rate=is_rate, help=text, task=task)
        for name, (text, is_rate) in described.items()
    )


RECALLS = (1, 10)
"""Ranks at which recall is reported."""

METRICS: dict[str, MetricInfo] = _table(
    _rate("clean_accuracy", True, "correct on the clean image, over all samples"),
    _rate("robust_accuracy", True, "correct on the clean and on the adversarial image, over all samples"),
    _rate("asr", False, "fooled, among the samples that are correct when clean"),
    _rate("asr_total", False, "wrong on the adversarial image, over all judged samples"),
    _rate("flip_rate", False, "prediction changed, over all judged samples"),
    _rate("targeted_success", False, "predicted as the attack's target, over all judged samples with a target"),
    _rate("asr_8bit", False, "asr after rounding to 8 bits inside the budget"),
    _rate("collapse_ceiling", None, "flip rate of always predicting the most frequent adversarial prediction"),
    _retrieval("clean_map@10", "mean average precision of the first 10 items, clean queries"),
    _retrieval("map@10", "mean average precision of the first 10 items, attacked queries"),
    _retrieval("clean_recall@1", "clean queries whose first item is relevant"),
    _retrieval("recall@1", "attacked queries whose first item is relevant"),
    _retrieval("clean_recall@10", "clean queries with a relevant item among the first 10"),
    _retrieval("recall@10", "attacked queries with a relevant item among the first 10"),
    *_of_texts("image_text", IMAGE_TEXT_METRICS),
    *_of_texts("entailment", ENTAILMENT_METRICS),
    *_of_texts("captioning", CAPTIONING_METRICS),
    _detector(
        "refused_clean",
        False,
        True,
        "clean images that the detector refuses, its false positives, of all judged samples",
    ),
    _detector("refused", True, True, "adversarial images that the detector refuses, of all judged samples"),
    _detector("detector_auroc", True, False, "area under the detector's ROC curve, adversarial against clean images"),
    _mean("feature_cosine", True, "mean cosine similarity of adversarial and clean features"),
    _mean("linf_max", None, "largest change of any pixel of any image, in [0, 1] units"),
    _mean("l2_mean", None, "mean Euclidean norm of the change, in [0, 1] units"),
    _mean("ssim_mean", None, "mean structural similarity of adversarial and clean images"),
    _mean("forwards_per_sample", None, "mean forward passes of the attack per sample"),
    _mean("backwards_per_sample", None, "mean backward passes of the attack per sample"),
    _mean("seconds", None, "mean seconds of the attack per sample"),
)
"""Every metric of a cell, in the order reports show them."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One attack on one victim, sample by sample: arrays of equal length `(n,)`.

    `label` and the predictions are logit indices; `adv8_pred` is the prediction after rounding to 8 bits.
    `error` marks rows that could not be judged: their predictions mean nothing and their numbers are NaN. In a
    judged row NaN means that nobody measured it, and the metric is then not measured either. `linf` and `l2` are
    in [0, 1] units, `seconds` and the passes are per sample. `target` is -1 where the attack had none. `retrieval`
    holds `clean_ap`, `adv_ap`, `clean_rank` and `adv_rank` where the head ranks a gallery (see `heads.base.Ranking`).
    `acceptance` holds `clean_acceptance`, `adv_acceptance` and `adv8_acceptance` behind a detector, which refuses an
    image below 0: a refused clean image is not correct, and a refused adversarial one fools nobody. `pairing` holds the
    scores of every caption where the head ranks captions, `spoken` the words of a victim that describes images.

    Raises:
        ValueError: Lengths differ, or a judged row lacks a label or a prediction.
    """

    label: IntArray
    clean_pred: IntArray
    adv_pred: IntArray
    adv8_pred: IntArray
    error: BoolArray
    linf: FloatArray
    l2: FloatArray
    ssim: FloatArray
    feature_cosine: FloatArray
    forwards: FloatArray
    backwards: FloatArray
    seconds: FloatArray
    target: IntArray
    retrieval: Mapping[str, FloatArray] | None = None
    acceptance: Mapping[str, FloatArray] | None = None
    pairing: Pairing | None = None
    spoken: Spoken | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in ("retrieval", "acceptance", "pairing", "spoken"):
                continue
            shape = getattr(self, field.name).shape
            if shape != (len(self.label),):
                raise ValueError(f"{field.name} has shape {shape}, expected ({len(self.label)},) as label")
        if self.error.dtype != np.bool_:
            raise ValueError(f"error must be boolean, got {self.error.dtype}")
        for name in ("label", "clean_pred", "adv_pred", "adv8_pred"):
            missing = int((getattr(self, name)[self.judged] < 0).sum())
            if missing:
                raise ValueError(
                    f"{missing} judged rows have no {name}; a row that was not judged must be an error row"
                )

    def __len__(self) -> int:
        return len(self.label)

    @property
    def judged(self) -> BoolArray:
        """Rows that hold a verdict."""
        return ~self.error

    @property
    def clean_correct(self) -> BoolArray:
        """Judged rows whose clean image is classified correctly, and not refused."""
        correct: BoolArray = self.judged & (self.clean_pred == self.label) & ~self.refused("clean")
        return correct

    @property
    def fooled(self) -> BoolArray:
        """Clean-correct rows whose adversarial image is classified wrongly, and not refused."""
        fooled: BoolArray = self.clean_correct & (self.adv_pred != self.label) & ~self.refused("adv")
        return fooled

    def refused(self, side: str) -> BoolArray:
        """Rows whose image of `side` (`clean`, `adv`, `adv8`) a detector refuses."""
        if self.acceptance is None:
            return np.zeros(len(self), dtype=np.bool_)
        refused: BoolArray = self.acceptance[f"{side}_acceptance"] < 0
        return refused


def compute(outcome: Outcome) -> dict[str, Interval]:
    """The metrics of one cell, in the order of `METRICS`.

    `targeted_success` is absent when no sample has a target, the retrieval metrics where nothing was ranked, those of
    captions where the head ranks none, and the detector's where nothing could be refused.
    Without a single judged row every value is None.
    """
    judged, correct = outcome.judged, outcome.clean_correct
    attempted = judged & (outcome.target >= 0)
    accepted = ~outcome.refused("adv")
    rates = {
        "clean_accuracy": _share_of_all(correct, judged),
        "robust_accuracy": _share_of_all(correct & ~outcome.fooled, judged),
        "asr": _share(outcome.fooled, correct),
        "asr_total": _share((outcome.adv_pred != outcome.label) & accepted, judged),
        "flip_rate": _share((outcome.adv_pred != outcome.clean_pred) & accepted, judged),
        "targeted_success": _share((outcome.adv_pred == outcome.target) & accepted, attempted),
        "asr_8bit": _share((outcome.adv8_pred != outcome.label) & ~outcome.refused("adv8"), correct),
        "collapse_ceiling": _share(outcome.clean_pred != most_frequent(outcome.adv_pred[judged]), judged),
    }
    if not (outcome.target >= 0).any():
        del rates["targeted_success"]
    return {
        **rates,
        **(_retrieval_metrics(outcome.retrieval, judged) if outcome.retrieval else {}),
        **(_text_metrics(outcome) if outcome.acceptance is None else {}),
        **(_detector_metrics(outcome) if outcome.acceptance else {}),
        "feature_cosine": _mean_of(outcome.feature_cosine[judged]),
        "linf_max": _max_of(outcome.linf[judged]),
        "l2_mean": _mean_of(outcome.l2[judged]),
        "ssim_mean": _mean_of(outcome.ssim[judged]),
        "forwards_per_sample": _mean_of(outcome.forwards[judged]),
        "backwards_per_sample": _mean_of(outcome.backwards[judged]),
        "seconds": _mean_of(outcome.seconds[judged]),
    }


def _text_metrics(outcome: Outcome) -> dict[str, Interval]:
    """Recall, entailment and words; nothing behind a detector, where a refused image is in no gallery."""
    found: dict[str, Interval] = {}
    if outcome.pairing is not None:
        found |= outcome.pairing.metrics(outcome.label, outcome.target, outcome.judged)
    if outcome.spoken is not None:
        found |= outcome.spoken.metrics(outcome.judged)
    return found


def _retrieval_metrics(retrieval: Mapping[str, FloatArray], judged: BoolArray) -> dict[str, Interval]:
    """Means of average precision, and shares of queries whose first relevant item comes early enough."""
    sides = (("clean", "clean_"), ("adv", ""))
    found = {}
    for side, prefix in sides:
        precision, rank = retrieval[f"{side}_ap"][judged], retrieval[f"{side}_rank"]
        measured = not np.isnan(precision).any() and not np.isnan(rank[judged]).any()
        found[f"{prefix}map@10"] = bounded_mean(precision.tolist()) if measured else Interval()
        for k in RECALLS:
            found[f"{prefix}recall@{k}"] = _share(rank <= k, judged) if measured else Interval()
    return {name: found[name] for name in METRICS if name in found}


def _detector_metrics(outcome: Outcome) -> dict[str, Interval]:
    """How often the detector refuses, and how well its score tells adversarial images from clean ones."""
    assert outcome.acceptance is not None
    judged = outcome.judged
    clean, adv = (outcome.acceptance[f"{side}_acceptance"][judged] for side in ("clean", "adv"))
    return {
        "refused_clean": _share(outcome.refused("clean"), judged),
        "refused": _share(outcome.refused("adv"), judged),
        "detector_auroc": Interval(value=_auroc(-adv, -clean)) if len(clean) else Interval(),
    }


def _auroc(positive: FloatArray, negative: FloatArray) -> float:
    """How often a positive scores above a negative, ties counting half (Mann-Whitney)."""
    ranks = rankdata(np.concatenate([positive, negative]))
    count = len(positive)
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(negative)))


def worst_case(outcomes: Sequence[Outcome]) -> dict[str, Interval]:
    """`robust_accuracy` and `asr` against whichever attack works, sample by sample.

    A sample is fooled when any attack fooled it. One that no attack fooled and that some attack failed on is
    unknown: not robust in `robust_accuracy`, and left out of `asr`.

    Args:
        outcomes: Attacks on the same samples of the same victim, in the same order.

    Raises:
        ValueError: There is no outcome, or they are not about the same samples.
    """
    if not outcomes:
        raise ValueError("a worst case needs at least one attack")
    for outcome in outcomes[1:]:
        if not np.array_equal(outcome.label, outcomes[0].label):
            raise ValueError("a worst case needs attacks on the same samples, but the labels differ")
    fooled = np.logical_or.reduce([outcome.fooled for outcome in outcomes])
    robust = np.logical_and.reduce([outcome.clean_correct & ~outcome.fooled for outcome in outcomes])
    judged = np.logical_or.reduce([outcome.judged for outcome in outcomes])
    return {"robust_accuracy": _share_of_all(robust, judged), "asr": _share(fooled, fooled | robust)}


def _share(hits: BoolArray, among: BoolArray) -> Interval:
    return wilson(int((hits & among).sum()), int(among.sum()))


def _share_of_all(hits: BoolArray, judged: BoolArray) -> Interval:
    # Zero of n would claim a measured failure where nothing was measured at all.
    return wilson(int(hits.sum()), len(hits)) if judged.any() else Interval()


def most_frequent(predictions: IntArray) -> int:
    """The class predicted most often, -1 where there is no prediction."""
    # Of several equally frequent classes the lowest index, so that the figure is reproducible.
    return int(np.bincount(predictions).argmax()) if len(predictions) else -1


def _mean_of(values: FloatArray) -> Interval:
    return _measured(float(values.mean())) if len(values) else Interval()


def _max_of(values: FloatArray) -> Interval:
    return _measured(float(values.max())) if len(values) else Interval()


def _measured(value: float) -> Interval:
    return Interval() if np.isnan(value) else Interval(value=value)
