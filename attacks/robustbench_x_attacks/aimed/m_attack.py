"""M-Attack: random crops of the image matched to random crops of the target, on an ensemble of encoders."""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.plugin import AttackSpec, param
from robustbench_x.views import EncoderView
from robustbench_x_attacks.aimed.targets import ensemble, goals_of, sources_in, targets_of
from robustbench_x_attacks.aimed.transforms import crop_boxes, crop_resized
from robustbench_x_attacks.iterative import Evaluation, ascend
from robustbench_x_attacks.steps import steepest

__all__ = ["SPEC", "MAttack"]


@final
@dataclass(frozen=True, kw_only=True)
class MAttack:
    """M-Attack (Li et al. 2025, arXiv 2503.10635): local matching by crops, 300 sign steps of 1/255, no momentum.

    In every step the image and the target are each cropped at random (50 to 90 % of the area) and resized back, and the
    mean cosine of their features over the ensemble is ascended, from the clean image; the paper's budget is 16/255.

    Departures: the ensemble is the audited encoder (unless own is false) with the public ones named, where the paper
    has three CLIPs of its own, none of them the victim; each image draws its own crops, where the code shares one in a
    batch. The last images are the result, as in the code: the loss of another crop says nothing about them.
    """

    encoders: str = param("", "further public encoder sources, by comma; the audited one is not taken twice")
    own: bool = param(True, "the audited encoder is in the ensemble; false: transfer alone")
    steps: int = param(300, "gradient steps")
    step_size: float = param(1 / 255, "in [0, 1] units")
    least: float = param(0.5, "smallest share of the area that a crop keeps")
    most: float = param(0.9, "largest share")
    crop_target: bool = param(True, "crop the target too; false: whole (the paper's setting for Claude)")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not self.step_size > 0:
            raise ValueError(f"step_size={self.step_size} must be positive")
        if not 0 < self.least <= self.most <= 1:
            raise ValueError(f"least={self.least} and most={self.most} must be in order and within (0, 1]")

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`. AttackError without target images or any encoder to run on."""
        if view.threat.radius == 0:
            return view.inputs.clone()
        targets = targets_of(view)
        encoders = ensemble(view, own=self.own, named=self.encoders)
        whole = None if self.crop_target else goals_of(encoders, targets)

        def crop(images: Tensor, index: Tensor) -> Tensor:
            size = (images.shape[-2], images.shape[-1])
            return crop_resized(images, crop_boxes(view.random, size, (self.least, self.most), index))

        def objective(images: Tensor, index: Tensor) -> Evaluation:
            seen = crop(images, index)
            if whole is None:
                goals = goals_of(encoders, crop(targets[index], index))
            else:
                goals = [goal[index] for goal in whole]
            cosines = [
                F.cosine_similarity(encoder.features(seen), goal, dim=1)
                for encoder, goal in zip(encoders, goals, strict=True)
            ]
            return Evaluation(torch.stack(cosines).mean(dim=0), None)

        rule = steepest(self.step_size)
        return ascend(view, objective, rule, steps=self.steps, random_start=False, random_loss=True).images


SPEC = AttackSpec(
    name="m_attack",
    summary="targeted: random crops pulled to crops of a target image, on an ensemble of encoders",
    factory=MAttack,
    source="Li et al. 2025, M-Attack, arXiv 2503.10635",
    access="encoder",
    goal="targeted",
    partners=lambda attack: sources_in(attack.encoders),
    aims=True,
)
