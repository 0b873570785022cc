"""Small victims with real encoders and heads, and the view an attack gets of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder, Preprocessing, Tokens
from robustbench_x.encoders.text import TextTower
from robustbench_x.fitting.artifact import Artifact
from robustbench_x.fitting.ground import Ground, Pool
from robustbench_x.fitting.job import FitJob
from robustbench_x.heads.base import FittedHead
from robustbench_x.plugin import AttackSpec
from robustbench_x.randomness import SampleRandom, derive_seed
from robustbench_x.threat import ThreatModel
from robustbench_x.views import (
    Access,
    EncoderHandle,
    EncoderView,
    ImageView,
    Meter,
    ModelHandle,
    Query,
    QueryView,
    View,
    WhiteboxView,
)

__all__ = ["ToyVictim", "fit_toy", "linear_victim", "make_view", "toy_ground", "toy_job", "toy_victim"]

SIDE = 16


@dataclass(frozen=True, kw_only=True)
class ToyVictim:
    """An encoder with a head, and images `(N, 3, S, S)` that it classifies as `labels`."""

    encoder: Encoder
    head: FittedHead
    images: Tensor
    labels: Tensor

    def logits(self, images: Tensor) -> Tensor:
        """Logits `(N, K)`."""
        logits: Tensor = self.head(self.encoder(images))
        return logits


@final
class _ConvNet(nn.Module):
    """Two convolutions with batch norm: layers `early` and `late`, features by average pooling."""

    layers = ("early", "late")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.GELU())
        self.late = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.GELU())

    def pooled(self, images: Tensor) -> Tensor:
        features: Tensor = self.late(self.early(images))
        return features.mean(dim=(2, 3))

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        maps = {"early": self.early(images)}
        if "late" in layers:
            maps["late"] = self.late(maps["early"])
        return [Tokens(maps[name].flatten(2).transpose(1, 2), None) for name in layers]


@final
class _Flat(nn.Module):
    """The pixels themselves as features."""

    layers: tuple[str, ...] = ()

    def pooled(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        return []


def toy_victim(*, num_classes: int = 5, num_images: int = 12, seed: int = 0) -> ToyVictim:
    """A small random convolutional encoder with a prototype-like head that is right on every image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _ConvNet(8)
    means = torch.rand(num_classes, 3, 4, 4, generator=generator)
    labels = torch.arange(num_images) % num_classes
    coarse = F.interpolate(means[labels], (SIDE, SIDE), mode="bilinear", align_corners=False)
    images = (0.8 * coarse + 0.1 + 0.1 * torch.rand(coarse.shape, generator=generator)).clamp(0, 1)
    images = (images * 255).round() / 255
    encoder = Encoder(source="toy", backbone=net, preprocessing=Preprocessing(input_size=(SIDE, SIDE)))
    with torch.no_grad():
        features = encoder(images)
    centre, spread = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    prototypes = torch.stack([((features - centre) / spread)[labels == k].mean(dim=0) for k in range(num_classes)])
    weight = 2 * prototypes / spread
    bias = -prototypes.square().sum(dim=1) - weight @ centre
    head = _linear_head(weight, bias)
    return ToyVictim(encoder=encoder, head=head, images=images, labels=head(features).argmax(dim=1))


def linear_victim(*, num_images: int = 8, seed: int = 0) -> tuple[ToyVictim, Tensor]:
    """A linear two-class model on raw pixels, with its signed margin `w.x + b` known in closed form.

    Returns:
        The victim and `w` `(3 * S * S,)`: the smallest change that reaches the boundary has linf size
        `margin / sum(abs(w))` and Euclidean size `margin / norm(w)`.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3 * SIDE * SIDE, generator=generator)
    images = 0.3 + 0.4 * torch.rand(num_images, 3, SIDE, SIDE, generator=generator)
    scores = images.flatten(1) @ weight
    ordered = scores.sort().values
    bias = -(ordered[num_images // 2 - 1] + ordered[num_images // 2]) / 2
    head = _linear_head(torch.stack([torch.zeros_like(weight), weight]), torch.tensor([0.0, float(bias)]))
    encoder = Encoder(source="linear", backbone=_Flat(), preprocessing=Preprocessing(input_size=(SIDE, SIDE)))
    victim = ToyVictim(encoder=encoder, head=head, images=images, labels=(scores + bias > 0).long())
    return victim, weight


def make_view(
    access: Access,
    victim: ToyVictim,
    threat: ThreatModel,
    *,
    seed: int = 0,
    exhaustive: bool = False,
    meter: Meter | None = None,
    artifact: Mapping[str, Tensor] | None = None,
) -> View:
    """The view that an attack with `access` gets of `victim`, undefended; `artifact` is what a fitted one learned."""
    meter = meter or Meter()
    shared: dict[str, Any] = {
        "inputs": victim.images.clone(),
        "threat": threat,
        "random": SampleRandom([derive_seed(seed, i) for i in range(len(victim.images))]),
        "exhaustive": exhaustive,
    }
    if access == "none":
        return ImageView(**shared)
    if access == "encoder":
        words = _means(victim)  # the tower must not hold the victim
        tower = TextTower(embed=lambda texts: torch.stack([words[text] for text in texts]), scale=20.0, sha256="toy")
        handle = EncoderHandle(victim.encoder, lambda images: images, meter, text=tower)
        partner = EncoderHandle(toy_victim(seed=1).encoder, lambda images: images, meter)
        # Neighbours are of other classes: see toy_victim.
        return EncoderView(
            **shared,
            encoder=handle,
            artifact=artifact,
            partners=(partner,),
            targets=victim.images.roll(1, dims=0),
            target_texts=tuple(str(label) for label in victim.labels.roll(1).tolist()),
        )
    shared |= {"labels": victim.labels.clone(), "num_classes": victim.head.num_classes}
    if access == "whitebox":
        return WhiteboxView(**shared, model=ModelHandle(victim.logits, meter))
    answer = "scores" if access == "scores" else "labels"
    return QueryView(**shared, query=Query(victim.logits, meter, answer=answer, cap=None))  # type: ignore[arg-type]


def _means(victim: ToyVictim) -> dict[str, Tensor]:
    """The mean features of each class, by its number as text: what the toy reads."""
    with torch.no_grad():
        features = victim.encoder(victim.images)
    return {str(label): features[victim.labels == label].mean(dim=0) for label in sorted(set(victim.labels.tolist()))}


def fit_toy(
    spec: AttackSpec,
    params: Mapping[str, Any],
    victim: ToyVictim,
    threat: ThreatModel,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    every: float = 20.0,
) -> Artifact:
    """What a fitted attack learns on the toy encoder from 24 blurred random images."""
    return toy_job(spec, params, victim, threat, seed=seed).run(checkpoint, every=every)


def toy_job(
    spec: AttackSpec, params: Mapping[str, Any], victim: ToyVictim, threat: ThreatModel, *, seed: int = 0
) -> FitJob:
    """The training of a fitted attack on the toy encoder, alone or with itself as every partner it asks for."""
    attack = spec.build(params)
    ground = toy_ground(victim, threat, seed=seed, partners=len(spec.partners(attack)))
    return FitJob(spec=spec, attack=attack, ground=ground)


def toy_ground(victim: ToyVictim, threat: ThreatModel, *, seed: int = 0, partners: int = 0) -> Ground:
    """What a training on the toy encoder stands on: 24 blurred random images, and the encoder again as each partner."""
    generator = torch.Generator().manual_seed(derive_seed("surrogate", seed))
    coarse = torch.rand(24, 3, 4, 4, generator=generator)
    images = F.interpolate(coarse, victim.encoder.input_size, mode="bilinear", align_corners=False)
    return Ground(
        public=victim.encoder,
        partners=(victim.encoder,) * partners,
        pool=Pool(source="toy:surrogate", levels=(images * 255).round().to(torch.uint8), sha256=str(seed)),
        threat=threat,
        seed=seed,
        device=torch.device("cpu"),
    )


def _linear_head(weight: Tensor, bias: Tensor) -> FittedHead:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    names = {str(k): k for k in range(len(weight))}
    return FittedHead(name="toy", layer=layer, num_classes=len(weight), aliases=names)
