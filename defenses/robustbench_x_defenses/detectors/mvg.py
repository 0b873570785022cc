"""mvg: refuses what lies far from the clean images' features (after Rippel et al. 2020)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from robustbench_x.plugin import Defense, DefenseSpec, Trainer, param
from robustbench_x.views import DefenseFitView, EncoderHandle
from robustbench_x_defenses.detectors.gaussian import Gaussian

__all__ = ["MVG", "SPEC"]

_POOLED = "pooled"
_BATCH = 32


@final
@dataclass(frozen=True, kw_only=True)
class MVG:
    """A multivariate Gaussian on deep features (Rippel, Mertens & Merhof 2020, arXiv 2005.14140).

    One mean and one covariance, shrunk (Ledoit & Wolf 2004), for each layer's features, averaged over positions; the
    score is the sum over layers of the squared Mahalanobis distance, each over its number of components. No label and
    no adversarial image is used. The harness sets the threshold by the false positives on held-out clean images.

    Departures:
        The paper scores images for visual anomalies with an EfficientNet's blocks; here the victim's own encoder is
        read, and an attacker knows it.
        Each layer's distance is divided by its degrees of freedom, so that wide layers do not drown narrow ones; the
        paper adds them as they are.
    """

    artifact: str = param("", "file of rbx fit mvg; empty: fit on the clean training images, cached")
    layers: str = param(_POOLED, "layers by comma, shallow to deep; 'pooled' is what the head reads, 'all' every layer")
    components: Literal["all", "leading", "trailing"] = param("all", "principal components kept")
    variance: float = param(0.99, "share of the variance that the leading components make up")

    def __post_init__(self) -> None:
        if not self.layers.strip():
            raise ValueError("layers names no layer")
        if not 0 < self.variance < 1:
            raise ValueError(f"variance={self.variance} must lie between 0 and 1")

    def trainer(self, view: DefenseFitView) -> Trainer:
        """A training from its start: one step."""
        return _Trainer(self, view)

    def armed(self, learned: Mapping[str, Tensor]) -> Defense:
        """The detector with its Gaussians."""
        names = sorted({name.partition(".")[2] for name in learned})
        if not names:
            raise ValueError("these are no Gaussians of mvg")
        return _Armed({n: Gaussian(learned[f"mean.{n}"], learned[f"whitening.{n}"]) for n in names})


@final
@dataclass(frozen=True)
class _Armed:
    """What is deployed: images pass unchanged, if they pass."""

    gaussians: Mapping[str, Gaussian]

    def apply(self, images: Tensor) -> Tensor:
        """The images."""
        return images

    def score(self, images: Tensor, encoder: EncoderHandle) -> Tensor:
        """Sum over layers of the distance to clean features, `(N,)`."""
        features = _features(encoder, images, tuple(self.gaussians))
        scores = torch.stack([self.gaussians[name].distance(f) for name, f in features.items()])
        return scores.sum(dim=0)


@final
class _Trainer:
    """Features of every clean image, and their Gaussians; a single step."""

    steps, batch = 1, 1

    def __init__(self, detector: MVG, view: DefenseFitView) -> None:
        self._detector = detector
        self._view = view
        self._learned: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`; the images are all of them, whatever `index` says."""
        view = self._view
        assert view.encoder is not None, "mvg is fitted for one encoder"
        names = _layers(self._detector.layers, view.encoder)
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for start in range(0, len(view.images), _BATCH):
            images = view.images.batch(torch.arange(start, min(start + _BATCH, len(view.images))))
            for name, features in _features(view.encoder, images, names).items():
                parts[name].append(features)
        distances = []
        for name in names:
            features = torch.cat(parts[name])
            made = Gaussian.fit(features, keep=self._detector.components, variance=self._detector.variance)
            self._learned |= {f"mean.{name}": made.mean, f"whitening.{name}": made.whitening}
            distances.append(made.distance(features).mean())
        return {"distance": torch.stack(distances).mean()}

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return dict(self._learned)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        self._learned = dict(state)

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return dict(self._learned)


def _layers(asked: str, encoder: EncoderHandle) -> tuple[str, ...]:
    known = (*encoder.layers, _POOLED)
    names = known if asked.strip() == "all" else tuple(name.strip() for name in asked.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"layers={asked}: the encoder has no layer {unknown[0]}; it has {', '.join(known)}")
    return names


def _features(encoder: EncoderHandle, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """`(N, D)` of each layer: the mean over its positions and prefix tokens, or the pooled features."""
    found = {}
    deep = [name for name in names if name != _POOLED]
    if deep:
        for name, tokens in encoder.tokens(images, deep).items():
            parts = [tokens.spatial] if tokens.prefix is None else [tokens.prefix, tokens.spatial]
            found[name] = torch.cat(parts, dim=1).float().mean(dim=1)
    if _POOLED in names:
        found[_POOLED] = encoder.features(images)
    return found


SPEC = DefenseSpec(
    name="mvg",
    summary="detector: distance of deep features to a Gaussian of the clean ones",
    factory=MVG,
    source="Rippel et al. 2020, arXiv 2005.14140; shrinkage: Ledoit & Wolf 2004",
    knowledge=("oblivious", "full"),
    fits=True,
    per_encoder=True,
    fitted_by=("layers", "components", "variance"),
    detects=True,
)
