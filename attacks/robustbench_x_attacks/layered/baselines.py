"""Feature attacks on single images that DTA is measured against: nrdm, ssp_image, dr_image."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.plugin import AttackSpec, param
from robustbench_x.views import EncoderHandle, EncoderView
from robustbench_x_attacks import losses
from robustbench_x_attacks.iterative import Evaluation, ascend
from robustbench_x_attacks.steps import steepest

__all__ = ["NRDM", "SPECS", "DRImage", "SSPImage"]

_STEPS_HELP = "gradient steps"
_SIZE_HELP = "in [0, 1] units; default 2.5 * eps / steps"
_LAYER_HELP = "layer by name; empty: by depth"
_DEPTH_HELP = "share of the layers that lie before the one attacked"
_EOT_HELP = "passes averaged per step when the victim is random"

Measure = Callable[[Tensor, Tensor], Tensor]
"""Adversarial and clean maps `(N, T, D)` to what is ascended, `(N,)`."""


@dataclass(frozen=True, kw_only=True)
class _OneLayer:
    """Sign ascent on a measure of one layer's output; a subclass says which measure."""

    steps: int = param(10, _STEPS_HELP)
    step_size: float | None = param(None, _SIZE_HELP)
    layer: str = param("", _LAYER_HELP)
    depth: float = param(0.5, _DEPTH_HELP)
    eot: int = param(10, _EOT_HELP)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.eot < 1:
            raise ValueError("steps and eot must be at least 1")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth} must lie in [0, 1]")

    def _ascend(self, view: EncoderView, measure: Measure) -> Tensor:
        layer = layer_at(view.encoder, self.layer, self.depth)
        with torch.no_grad():
            clean = losses.feature_maps(view.encoder, view.inputs, layer)

        def objective(images: Tensor, index: Tensor) -> Evaluation:
            return Evaluation(measure(losses.feature_maps(view.encoder, images, layer), clean[index]), None)

        size = self.step_size if self.step_size is not None else 2.5 * view.threat.radius / self.steps
        draws = self.eot if view.encoder.stochastic else 1
        return ascend(view, objective, steepest(size), steps=self.steps, random_start=True, draws=draws).images


@final
@dataclass(frozen=True, kw_only=True)
class NRDM(_OneLayer):
    """Neural representation distortion (Naseer et al. 2018, arXiv 1811.09020): one layer's output moves away.

    The Euclidean distance of the layer's activations grows, from a noisy start. Departures: there one layer of VGG-16,
    here by depth, half-way by default; a uniform start in the budget; the squared distance, which has the same signs.
    """

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`. AttackError where the encoder has no such layer."""
        return self._ascend(view, losses.feature_l2)


@final
@dataclass(frozen=True, kw_only=True)
class SSPImage(_OneLayer):
    """Self-supervised perturbation (Naseer et al., CVPR 2020) on single images; `ssp` is its universal form.

    The squared distance between the squares of one layer's activations grows, the form in L4A's comparison.
    Departures: the layer is chosen by depth; a uniform start in the budget.
    """

    depth: float = param(0.4, _DEPTH_HELP)

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`. AttackError where the encoder has no such layer."""
        return self._ascend(view, lambda maps, clean: losses.feature_l2(maps.square(), clean.square()))


@final
@dataclass(frozen=True, kw_only=True)
class DRImage(_OneLayer):
    """Dispersion reduction (Lu et al., CVPR 2020) on single images; `dr` is its universal form.

    The standard deviation of one layer's output falls. Departures: the layer is chosen by depth; a uniform start in
    the budget; no momentum.
    """

    depth: float = param(0.25, _DEPTH_HELP)

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`. AttackError where the encoder has no such layer."""
        return self._ascend(view, lambda maps, clean: -maps.flatten(1).std(dim=1))


def layer_at(encoder: EncoderHandle, name: str, depth: float) -> str:
    """The layer called `name`, or the one with the share `depth` of the layers before it.

    Raises:
        AttackError: The encoder names no layers.
    """
    if not encoder.layers:
        raise AttackError("this attack looks at layers, and the encoder names none: use embed")
    return name or encoder.layers[min(math.floor(depth * len(encoder.layers) + 1e-9), len(encoder.layers) - 1)]


def _spec(name: str, summary: str, factory: type, source: str) -> AttackSpec:
    return AttackSpec(
        name=name,
        summary=summary,
        factory=factory,
        source=source,
        access="encoder",
        norms=("linf", "l2", "patch"),
    )


SPECS = (
    _spec("nrdm", "a middle layer's activations pushed away", NRDM, "Naseer et al. 2018, arXiv 1811.09020"),
    _spec(
        "ssp_image",
        "a middle layer's squared activations pushed away",
        SSPImage,
        "Naseer et al. 2020, arXiv 2006.04924",
    ),
    _spec("dr_image", "an early layer's dispersion reduced", DRImage, "Lu et al. 2020, arXiv 1911.11616"),
)
