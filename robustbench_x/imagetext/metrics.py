"""What is measured of victims that deal in text: recall of captions, entailment, and the words they find."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustbench_x.imagetext.captions import bleu, cider, rouge_l
from robustbench_x.stats import Interval, bounded_mean, wilson

__all__ = [
    "CAPTIONING_METRICS",
    "ENTAILMENT_METRICS",
    "IMAGE_TEXT_METRICS",
    "RANKS",
    "Described",
    "Pairing",
    "Spoken",
]

Described = Mapping[str, tuple[str, bool]]
"""What each metric says, and whether it is a share with an interval."""

RANKS = (1, 5, 10)
_SIDES = {
    "clean_": "clean images, their own captions",
    "": "adversarial images, the captions of the originals",
    "target_": "adversarial images, the captions of their targets",
}


def _recalls() -> Described:
    found = {}
    for prefix, whose in _SIDES.items():
        for k in RANKS:
            found[f"{prefix}tr@{k}"] = (f"image to text: a right caption among the first {k}; {whose}", True)
        for k in RANKS:
            found[f"{prefix}ir@{k}"] = (f"text to image: a right image among the first {k}; {whose}", True)
        found[f"{prefix}r@mean"] = (f"mean of the six recalls; {whose}", False)
    return found


IMAGE_TEXT_METRICS = _recalls()

ENTAILMENT_METRICS: Described = {
    **{f"{prefix}entailed": (f"the model says yes to a caption; {whose}", True) for prefix, whose in _SIDES.items()},
    "clean_entailed_other": ("the model says yes to a caption of another image; clean images", True),
}

_SPOKEN = {
    "bleu4": "BLEU-4 of what the model says",
    "rouge_l": "ROUGE-L of what the model says",
    "cider": "CIDEr of what the model says (10 is the most)",
}
CAPTIONING_METRICS: Described = {
    f"{prefix}{name}": (f"{text}; {whose}", False) for prefix, whose in _SIDES.items() for name, text in _SPOKEN.items()
}


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Scores of n images with M captions: `clean` and `adv` `(n, M)`, NaN where not judged; `group` `(M,)` of captions.

    The captions of one image are a group, and a row's label or target is a group. A tie counts against the right one.
    Of a model that answers questions, a score above 0 is a yes.
    """

    clean: NDArray[np.float64]
    adv: NDArray[np.float64]
    group: NDArray[np.int64]
    answers: bool = False

    @classmethod
    def from_rows(cls, clean: NDArray[Any], adv: NDArray[Any], *, answers: bool = False) -> "Pairing | None":
        """From the stored columns, a list of the scores of each group per row; None where nothing was scored."""
        there = next((row for row in adv if row is not None), None)
        if there is None:
            return None
        sizes = [len(scores) for scores in there]
        blank = np.full(sum(sizes), np.nan)
        sides = [
            np.stack([blank if row is None else np.concatenate(list(row)).astype(np.float64) for row in side])
            for side in (clean, adv)
        ]
        return cls(clean=sides[0], adv=sides[1], group=np.repeat(np.arange(len(sizes)), sizes), answers=answers)

    def metrics(
        self, label: NDArray[np.int64], target: NDArray[np.int64], judged: NDArray[np.bool_]
    ) -> dict[str, Interval]:
        """Every metric of `IMAGE_TEXT_METRICS`, or `ENTAILMENT_METRICS`; those of the targets only where there is one.

        The galleries are the judged images, and every caption. Of a text whose image was not judged nothing is said.
        """
        measure = self._yes if self.answers else self._recalls
        found = measure("clean_", self.clean[judged], label[judged])
        found |= measure("", self.adv[judged], label[judged])
        aimed = judged & (target >= 0)
        if aimed.any():
            found |= measure("target_", self.adv[aimed], target[aimed])
        return found

    def _yes(self, prefix: str, scores: NDArray[np.float64], right: NDArray[np.int64]) -> dict[str, Interval]:
        own = right[:, None] == self.group
        yes = scores > 0
        found = {f"{prefix}entailed": bounded_mean([float(yes[i, own[i]].mean()) for i in range(len(own))])}
        if prefix == "clean_":
            others = [float(yes[i, ~own[i]].mean()) for i in range(len(own)) if not own[i].all()]
            found["clean_entailed_other"] = bounded_mean(others)
        return found

    def _recalls(self, prefix: str, scores: NDArray[np.float64], right: NDArray[np.int64]) -> dict[str, Interval]:
        own = right[:, None] == self.group
        to_text = _ranks(scores, own)
        asked = own.any(axis=0)
        to_image = _ranks(scores.T[asked], own.T[asked])
        found = {f"{prefix}tr@{k}": wilson(int((to_text <= k).sum()), len(to_text)) for k in RANKS}
        # The captions of one image stand or fall together: an interval over captions would be too narrow.
        images = self.group[asked]
        for k in RANKS:
            hit = to_image <= k
            found[f"{prefix}ir@{k}"] = bounded_mean([float(hit[images == group].mean()) for group in np.unique(images)])
        values = [interval.value for interval in found.values() if interval.value is not None]
        mean = Interval(value=float(np.mean(values))) if len(values) == len(found) else Interval()
        return {**found, f"{prefix}r@mean": mean}


def _ranks(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The place of the best right answer of each query `(Q,)`, 1 for the first; `scores` and `right` are `(Q, A)`."""
    best = np.where(right, scores, -np.inf).max(axis=1, initial=-np.inf, keepdims=True)
    ahead: NDArray[np.int64] = (~right & ~(scores < best)).sum(axis=1)
    return ahead + 1


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What a victim says of n images, clean and adversarial, and the captions of the image and of its target.

    Each holds None where there is nothing: rows that were not judged, and targets of an attack that does not aim.
    """

    clean: Sequence[str | None]
    adv: Sequence[str | None]
    own: Sequence[Sequence[str] | None]
    target: Sequence[Sequence[str] | None]

    @classmethod
    def from_rows(cls, clean: NDArray[Any], adv: NDArray[Any], own: NDArray[Any], target: NDArray[Any]) -> "Spoken":
        """From the stored columns."""
        lists = [[None if texts is None else [str(t) for t in texts] for texts in side] for side in (own, target)]
        return cls(clean=list(clean), adv=list(adv), own=lists[0], target=lists[1])

    def metrics(self, judged: NDArray[np.bool_]) -> dict[str, Interval]:
        """Every metric of `CAPTIONING_METRICS`, over the judged rows; those of the targets only where there is one."""
        found: dict[str, Interval] = {}
        for prefix, said, wanted in (
            ("clean_", self.clean, self.own),
            ("", self.adv, self.own),
            ("target_", self.adv, self.target),
        ):
            pairs = [
                (text, truth)
                for text, truth, there in zip(said, wanted, judged.tolist(), strict=True)
                if there and text is not None and truth is not None
            ]
            if pairs or prefix != "target_":
                found |= _worded(prefix, [text for text, _ in pairs], [truth for _, truth in pairs])
        return found


def _worded(prefix: str, said: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, Interval]:
    measures: dict[str, Callable[[], float]] = {
        "bleu4": lambda: bleu(said, wanted)[3].corpus,
        "rouge_l": lambda: rouge_l(said, wanted).corpus,
        "cider": lambda: cider(said, wanted).corpus,
    }
    # CIDEr weighs words by how rare they are among the images: of a single one it says nothing.
    least = {"cider": 2}
    return {
        f"{prefix}{name}": Interval(value=measure()) if len(said) >= least.get(name, 1) else Interval()
        for name, measure in measures.items()
    }
