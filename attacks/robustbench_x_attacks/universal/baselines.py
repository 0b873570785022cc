"""The universal baselines that AdvEncoder is measured against, on the same steps: uap, ssp, dr, fff, pap."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.plugin import AttackSpec, Fitted, Trainer, param
from robustbench_x.randomness import derive_seed
from robustbench_x.views import EncoderHandle, EncoderView, FitView
from robustbench_x_attacks import losses
from robustbench_x_attacks.universal.pattern import (
    Ascent,
    Improve,
    Loss,
    Objective,
    SignTrainer,
    apply_artifact,
    clean_features,
    gradient_of,
    put_on,
    step_places,
)

__all__ = ["DR", "FFF", "PAP", "SPECS", "SSP", "UAP"]

_STEPS_HELP = "sign steps"
_BATCH_HELP = "surrogate images per step"
_RATE_HELP = "first step size, as a share of the budget"
_LAYER_HELP = "layer by name; empty: by depth"
_DEPTH_HELP = "share of the layers that lie before the one attacked"
_REDRAW = 20
_UGS_IMAGES = 8
_UGS_REAL = 0.01


@final
@dataclass(frozen=True, kw_only=True)
class UAP(Fitted):
    """Universal perturbation by feature ascent: the squared distance of pooled features grows.

    UAP (Moosavi-Dezfooli et al. 2017) needs labels and a boundary; with the encoder alone, what is left of it is
    projected ascent on the change of the features, as AdvEncoder's comparison has it. Steps, momentum and schedule
    are ours and the same for every baseline here.
    """

    steps: int = param(200, _STEPS_HELP)
    batch: int = param(16, _BATCH_HELP)
    rate: float = param(0.2, _RATE_HELP)

    def __post_init__(self) -> None:
        _check(self.steps, self.batch)

    def trainer(self, view: FitView) -> Trainer:
        """A training of the pattern; access `encoder`."""
        features = clean_features(view)

        def objective(adversarial: Tensor, clean: Tensor, index: Tensor, number: int) -> Loss:
            del clean, number
            kept = features[index.to(features.device)]
            return _fall(-losses.feature_l2(view.encoder.features(adversarial), kept).mean())

        return _sign(view, objective, self.steps, self.batch, self.rate)

    def run(self, view: EncoderView) -> Tensor:
        """Images with the learned pattern on."""
        return apply_artifact(view)


@final
@dataclass(frozen=True, kw_only=True)
class SSP(Fitted):
    """Self-supervised perturbation (Naseer et al., CVPR 2020): the features of one middle layer move away.

    There sample-wise, on a VGG layer; here universal, as L4A's comparison has it. Departures: the layer is chosen by
    depth; the squared difference of the activations themselves, not of their squares.
    """

    steps: int = param(200, _STEPS_HELP)
    batch: int = param(16, _BATCH_HELP)
    rate: float = param(0.2, _RATE_HELP)
    layer: str = param("", _LAYER_HELP)
    depth: float = param(0.4, _DEPTH_HELP)

    def __post_init__(self) -> None:
        _check(self.steps, self.batch, depth=self.depth)

    def trainer(self, view: FitView) -> Trainer:
        """A training of the pattern; access `encoder`."""
        layer = _layer(view.encoder, self.layer, self.depth)

        def objective(adversarial: Tensor, clean: Tensor, index: Tensor, number: int) -> Loss:
            del index, number
            with torch.no_grad():
                kept = losses.feature_maps(view.encoder, clean, layer)
            return _fall(-losses.feature_l2(losses.feature_maps(view.encoder, adversarial, layer), kept).mean())

        return _sign(view, objective, self.steps, self.batch, self.rate)

    def run(self, view: EncoderView) -> Tensor:
        """Images with the learned pattern on."""
        return apply_artifact(view)


@final
@dataclass(frozen=True, kw_only=True)
class DR(Fitted):
    """Dispersion reduction (Lu et al., CVPR 2020): the standard deviation of one layer's features falls.

    There sample-wise; here universal, as L4A's comparison has it. Departure: the layer is chosen by depth.
    """

    steps: int = param(200, _STEPS_HELP)
    batch: int = param(16, _BATCH_HELP)
    rate: float = param(0.2, _RATE_HELP)
    layer: str = param("", _LAYER_HELP)
    depth: float = param(0.4, _DEPTH_HELP)

    def __post_init__(self) -> None:
        _check(self.steps, self.batch, depth=self.depth)

    def trainer(self, view: FitView) -> Trainer:
        """A training of the pattern; access `encoder`."""
        layer = _layer(view.encoder, self.layer, self.depth)

        def objective(adversarial: Tensor, clean: Tensor, index: Tensor, number: int) -> Loss:
            del clean, index, number
            maps = losses.feature_maps(view.encoder, adversarial, layer)
            return _fall(maps.flatten(1).std(dim=1).mean())

        return _sign(view, objective, self.steps, self.batch, self.rate)

    def run(self, view: EncoderView) -> Tensor:
        """Images with the learned pattern on."""
        return apply_artifact(view)


@final
@dataclass(frozen=True, kw_only=True)
class FFF(Fitted):
    """Fast Feature Fool (Mopuri et al., BMVC 2017): no data; the pattern alone excites every layer.

    The sum over layers of the log of the activations' norm grows, with mid-grey carrying the pattern where the
    paper's mean-free input is zero.
    """

    steps: int = param(200, _STEPS_HELP)
    rate: float = param(0.2, _RATE_HELP)

    def __post_init__(self) -> None:
        _check(self.steps, 1)

    def trainer(self, view: FitView) -> Trainer:
        """A training of the pattern that looks at no image; access `encoder`."""
        layers = _layers(view.encoder)
        grey = torch.full((1, 3, *view.encoder.input_size), 0.5, device=view.device)

        def loss(adversarial: Tensor) -> Loss:
            tokens = view.encoder.tokens(adversarial, layers)
            norms = [tokens[name].spatial.flatten(1).norm(dim=1) for name in layers]
            return _fall(-torch.stack([norm.clamp(min=1e-12).log() for norm in norms]).sum())

        improve = _improve_on(view, lambda number: grey, lambda images, number: loss(images))
        return SignTrainer(view, improve, steps=self.steps, batch=0, rate=self.rate)

    def run(self, view: EncoderView) -> Tensor:
        """Images with the learned pattern on."""
        return apply_artifact(view)


@final
@dataclass(frozen=True, kw_only=True)
class PAP(Fitted):
    """Pre-trained adversarial perturbation, L4A (Ban and Dong, NeurIPS 2022): early activations are lifted.

    The mean square of the first layer's output grows (`base`), or of the first two layers (`fuse`), or that of the
    first layer on images of Gaussian noise whose mean and deviation per channel are redrawn every 20 steps, plus 0.01
    times the real images' (`ugs`). Departures: the second layer's weight is 1 (the published one is unknown to us);
    steps and schedule as for every baseline here, where L4A takes 10,000 to 30,000 small steps; images are valid.
    """

    variant: Literal["base", "fuse", "ugs"] = param("base", "base, fuse or ugs")
    steps: int = param(200, _STEPS_HELP)
    batch: int = param(16, _BATCH_HELP)
    rate: float = param(0.2, _RATE_HELP)

    def __post_init__(self) -> None:
        _check(self.steps, self.batch)

    def trainer(self, view: FitView) -> Trainer:
        """A training of the pattern; access `encoder`."""
        layers = _layers(view.encoder)[: 2 if self.variant == "fuse" else 1]

        def lift(images: Tensor) -> Tensor:
            tokens = view.encoder.tokens(images, layers)
            return torch.stack([tokens[name].spatial.square().mean() for name in layers]).sum()

        def objective(adversarial: Tensor, clean: Tensor, index: Tensor, number: int) -> Loss:
            del clean, index, number
            return _fall(-lift(adversarial))

        improve = gradient_of(view, objective)
        if self.variant == "ugs":
            noise = _improve_on(
                view, lambda number: _gaussians(view, number), lambda images, number: _fall(-lift(images))
            )
            improve = _sum(noise, improve, _UGS_REAL)
        return SignTrainer(view, improve, steps=self.steps, batch=min(self.batch, len(view.surrogate)), rate=self.rate)

    def run(self, view: EncoderView) -> Tensor:
        """Images with the learned pattern on."""
        return apply_artifact(view)


def _gaussians(view: FitView, number: int) -> Tensor:
    """L4A's images of noise: means around 0.4 to 0.6, deviations of 0.05 to 0.10, both redrawn every 20 steps."""
    moments = torch.Generator().manual_seed(derive_seed(view.seed, "moments", number // _REDRAW))
    mean = 0.4 + 0.2 * torch.rand(_UGS_IMAGES, 3, 1, 1, generator=moments)
    deviation = 0.05 + 0.05 * torch.rand(_UGS_IMAGES, 3, 1, 1, generator=moments)
    pixels = torch.Generator().manual_seed(derive_seed(view.seed, "noise", number))
    noise = torch.randn(_UGS_IMAGES, 3, *view.encoder.input_size, generator=pixels)
    return (mean + deviation * noise).clamp(0, 1).to(view.device)


def _improve_on(view: FitView, images: Callable[[int], Tensor], loss: Callable[[Tensor, int], Loss]) -> Improve:
    """The direction in which `loss` falls on images that are no surrogate's."""

    def improve(pattern: Tensor, number: int, index: Tensor) -> Ascent:
        del index
        with torch.enable_grad():
            variable = pattern.detach().requires_grad_(True)
            worn = put_on(images(number), variable, view.threat, places=step_places(view, number))
            found = loss(worn, number)
            (gradient,) = torch.autograd.grad(found.total, variable)
        return Ascent(-gradient, {name: term.detach() for name, term in found.terms.items()})

    return improve


def _sum(first: Improve, second: Improve, weight: float) -> Improve:
    def improve(pattern: Tensor, number: int, index: Tensor) -> Ascent:
        one, other = first(pattern, number, index), second(pattern, number, index)
        terms = {"noise": one.terms["adv"], "real": other.terms["adv"]}
        return Ascent(one.direction + weight * other.direction, terms)

    return improve


def _fall(total: Tensor) -> Loss:
    return Loss(total, {"adv": total})


def _sign(view: FitView, objective: Objective, steps: int, batch: int, rate: float) -> SignTrainer:
    size = min(batch, len(view.surrogate))
    return SignTrainer(view, gradient_of(view, objective), steps=steps, batch=size, rate=rate)


def _layers(encoder: EncoderHandle) -> tuple[str, ...]:
    if not encoder.layers:
        raise AttackError("this attack looks at layers, and the encoder names none")
    return encoder.layers


def _layer(encoder: EncoderHandle, name: str, depth: float) -> str:
    layers = _layers(encoder)
    return name or layers[min(math.floor(depth * len(layers) + 1e-9), len(layers) - 1)]


def _check(steps: int, batch: int, *, depth: float = 0.0) -> None:
    if steps < 1 or batch < 1:
        raise ValueError("steps and batch must be at least 1")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must lie in [0, 1]")


def _spec(name: str, summary: str, factory: type, source: str) -> AttackSpec:
    return AttackSpec(
        name=name,
        summary=summary,
        factory=factory,
        source=source,
        access="encoder",
        norms=("linf", "patch"),
        fits=True,
    )


SPECS = (
    _spec("uap", "universal: pooled features pushed away", UAP, "Moosavi-Dezfooli et al. 2017, arXiv 1610.08401"),
    _spec("ssp", "universal: a middle layer's features pushed away", SSP, "Naseer et al. 2020, arXiv 2006.04924"),
    _spec("dr", "universal: a middle layer's dispersion reduced", DR, "Lu et al. 2020, arXiv 1911.11616"),
    _spec("fff", "universal, data-free: every layer over-excited", FFF, "Mopuri et al. 2017, arXiv 1707.05572"),
    _spec(
        "pap", "universal: early activations lifted (L4A: base, fuse, ugs)", PAP, "Ban and Dong 2022, arXiv 2210.03372"
    ),
)
