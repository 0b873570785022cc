"""embed: pushes an encoder's features away from the clean ones, with the encoder alone."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from robustbench_x.plugin import AttackSpec, param
from robustbench_x.views import EncoderView
from robustbench_x_attacks import losses
from robustbench_x_attacks.iterative import Evaluation, ascend
from robustbench_x_attacks.steps import apgd, momentum, steepest

__all__ = ["SPEC", "Embed"]


@final
@dataclass(frozen=True, kw_only=True)
class Embed:
    """Sign ascent on the distance between adversarial and clean features (Kowalczuk et al. 2024).

    The paper ascends the squared Euclidean distance for 20 steps of 2/255 at eps 8/255 from a uniform start; here
    the step scales with eps and cosine distance is the default, as downstream heads mostly see directions.
    The random start is not optional: at the clean image both gradients are exactly zero.
    """

    steps: int = param(20, "gradient steps")
    step_size: float | None = param(None, "in [0, 1] units; default 2.5 * eps / steps")
    loss: Literal["cosine", "l2"] = param("cosine", "cosine or l2 distance to the clean features")
    layer: str = param("", "layer whose tokens are pushed; empty for the pooled features")
    rule: Literal["pgd", "mi", "apgd"] = param("pgd", "step rule: pgd, mi or apgd")
    eot: int = param(10, "passes averaged per step when the victim is random")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.eot < 1:
            raise ValueError("steps and eot must be at least 1")

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`."""
        with torch.no_grad():
            clean = losses.feature_maps(view.encoder, view.inputs, self.layer)
        distance = losses.feature_cosine if self.loss == "cosine" else losses.feature_l2

        def objective(images: Tensor, index: Tensor) -> Evaluation:
            features = losses.feature_maps(view.encoder, images, self.layer)
            return Evaluation(distance(features, clean[index]), None)

        radius = view.threat.radius
        size = self.step_size if self.step_size is not None else 2.5 * radius / self.steps
        rules = {"pgd": steepest(size), "mi": momentum(size, 1.0), "apgd": apgd(self.steps)}
        best = ascend(
            view,
            objective,
            rules[self.rule],
            steps=self.steps,
            random_start=True,
            draws=self.eot if view.encoder.stochastic else 1,
        )
        return best.images


SPEC = AttackSpec(
    name="embed",
    summary="pushes pooled or layer features away from the clean ones, encoder only",
    factory=Embed,
    source="Kowalczuk et al. 2024, Benchmarking Robust Self-Supervised Learning (ICML workshop)",
    access="encoder",
    norms=("linf", "l2", "patch"),
)
