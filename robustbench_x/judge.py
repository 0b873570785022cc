"""The judge: candidate images in, verdicts out. No attack or defence can claim what it did not do.

Candidates are checked (shape, finiteness), projected to the budget and to [0, 1], re-evaluated with fresh
forward passes in float32, and measured here. What cannot be judged becomes an error, never "robust".
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import kornia
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import SampleError
from robustbench_x.heads.base import CAPTIONED, FittedHead, Ranking
from robustbench_x.randomness import derive_seed
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import DefendedEncoder, fresh_draw

__all__ = ["Admitted", "Measured", "Prediction", "Reading", "admit", "measure", "predict", "read_features", "retrieve"]

_NONFINITE = "the victim returned NaN or infinite logits"
UNJUDGED = -1
"""The prediction of a sample that could not be judged."""


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """Candidates after the checks: safe to evaluate, with what was wrong with each.

    `images` `(N, C, H, W)` lie inside the budget (a rejected candidate is replaced by its clean image and
    carries an error); `overrun` `(N,)` says how far the candidate lay outside before it was projected.
    """

    images: Tensor
    errors: list[str | None]
    overrun: Tensor


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Features of one batch on one defended encoder: `(draws, N, D)`, one draw unless the defence is random.

    `acceptance` `(N,)` is there behind a detector: below 0 the image is refused.
    """

    features: Tensor
    acceptance: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Verdicts on one batch: classes `(N,)` (-1 where none), mean margin of the true logit `(N,)`, errors."""

    classes: Tensor
    margin: Tensor
    errors: list[str | None]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Distances between adversarial and clean images, each `(N,)`."""

    linf: Tensor
    l2: Tensor
    ssim: Tensor


def admit(candidates: object, inputs: Tensor, threat: ThreatModel) -> Admitted:
    """Checks what an attack returned and projects it to the budget.

    Args:
        candidates: Whatever the attack returned.
        inputs: Clean images `(N, C, H, W)` in [0, 1].
        threat: The budget.

    Raises:
        SampleError: It is no tensor of the inputs' shape, so no sample of the batch can be judged.
    """
    if not isinstance(candidates, Tensor):
        raise SampleError(f"the attack returned a {type(candidates).__name__}, not a tensor")
    if candidates.shape != inputs.shape:
        raise SampleError(f"the attack returned shape {tuple(candidates.shape)}, expected {tuple(inputs.shape)}")
    candidates = candidates.detach().to(device=inputs.device, dtype=torch.float32)
    finite = candidates.isfinite().flatten(1).all(dim=1)
    images = torch.where(finite.view(-1, 1, 1, 1), candidates, inputs)
    overrun = threat.overrun(images, inputs)
    errors = [None if ok else "the attack returned NaN or infinite pixels" for ok in finite.tolist()]
    return Admitted(images=threat.project(images, inputs), errors=errors, overrun=overrun)


@torch.no_grad()
def read_features(images: Tensor, victim: DefendedEncoder, *, draws: int, seed: int) -> Reading:
    """Features of `images` by fresh float32 passes; `draws` independent ones when the defence is random."""
    count = draws if victim.stochastic else 1
    readings = []
    for draw in range(count):
        with fresh_draw(derive_seed(seed, "judge", draw), images.device), _full_precision(images.device):
            readings.append(victim.features(images))
    acceptance = None
    if victim.detects:
        with fresh_draw(derive_seed(seed, "detect"), images.device), _full_precision(images.device):
            acceptance = victim.acceptance(images)
    return Reading(features=torch.stack(readings), acceptance=acceptance)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """float32 as it is written: by default torch lets CUDA convolutions round their inputs to TF32's 10 bits."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield


@torch.no_grad()
def predict(reading: Reading, head: FittedHead, labels: Tensor) -> Prediction:
    """What the head makes of the features, and what went wrong where no class can be given.

    With several draws a sample counts as right only when more than half of its draws are; otherwise its most
    frequent wrong class is the prediction. A logit that is not finite in any draw is an error, and so is a detector's
    score that is not: a comparison with NaN would refuse nothing.
    """
    logits = torch.stack([head(features) for features in reading.features])
    finite = logits.isfinite().all(dim=2).all(dim=0)
    scored = torch.ones_like(finite) if reading.acceptance is None else reading.acceptance.isfinite()
    votes = logits.argmax(dim=2) if head.task not in CAPTIONED else _strictly(logits, labels)
    right = (votes == labels).float().mean(dim=0) > 0.5
    counts = F.one_hot(votes, head.num_classes).sum(dim=0)
    wrong_class = counts.scatter(1, labels[:, None], -1).argmax(dim=1)
    index = labels.expand(len(logits), -1).unsqueeze(2)
    others = logits.scatter(2, index, -torch.inf).amax(dim=2)
    return Prediction(
        classes=torch.where(right, labels, wrong_class).masked_fill(~(finite & scored), UNJUDGED),
        margin=(logits.gather(2, index).squeeze(2) - others).mean(dim=0),
        errors=[
            None if both else "the detector's score is NaN or infinite" if fine else _NONFINITE
            for both, fine in zip((finite & scored).tolist(), finite.tolist(), strict=True)
        ],
    )


def _strictly(logits: Tensor, labels: Tensor) -> Tensor:
    """The class of each draw `(draws, N)`, where the label must lead alone: scores of captions tie often."""
    index = labels.expand(len(logits), -1).unsqueeze(2)
    others = logits.scatter(2, index, -torch.inf)
    leads = logits.gather(2, index).squeeze(2) > others.amax(dim=2)
    return torch.where(leads, labels, others.argmax(dim=2))


@torch.no_grad()
def retrieve(reading: Reading, head: FittedHead, labels: Tensor) -> Ranking:
    """How well the gallery is ranked; over several draws the mean precision, and the place more than half reach."""
    draws = [head.rank(features, labels) for features in reading.features]
    places = torch.stack([draw.first for draw in draws])
    precision = torch.stack([draw.precision for draw in draws]).mean(dim=0)
    return Ranking(precision=precision, first=places.kthvalue(len(draws) // 2 + 1, dim=0).values)


@torch.no_grad()
def measure(images: Tensor, inputs: Tensor) -> Measured:
    """Norms of the change and the structural similarity (11 x 11 window, range 1; Wang et al. 2004)."""
    change = images - inputs
    window = min(11, *(side - (1 - side % 2) for side in images.shape[-2:]))
    ssim = kornia.metrics.ssim(images, inputs, window_size=max(window, 1))
    return Measured(
        linf=change.abs().amax(dim=(1, 2, 3)),
        l2=torch.linalg.vector_norm(change.flatten(1), dim=1),
        ssim=ssim.flatten(1).mean(dim=1),
    )


def feature_cosine(adversarial: Reading, clean: Reading) -> Tensor:
    """Mean cosine similarity of adversarial and clean features over draws, `(N,)`."""
    return F.cosine_similarity(adversarial.features, clean.features, dim=2).mean(dim=0)


def first_errors(*lists: Sequence[str | None]) -> list[str | None]:
    """Per sample, the first error of several lists."""
    return [next((e for e in entry if e is not None), None) for entry in zip(*lists, strict=True)]
