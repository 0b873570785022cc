"""SSA-CWA: spectrum simulation inside the common-weakness attack, aimed at the features of a target image."""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.plugin import AttackSpec, param
from robustbench_x.views import EncoderHandle, EncoderView
from robustbench_x_attacks.aimed.targets import ensemble, goals_of, sources_in, targets_of
from robustbench_x_attacks.aimed.transforms import spectral

__all__ = ["SPEC", "SSACWA"]


@final
@dataclass(frozen=True, kw_only=True)
class SSACWA:
    """SSA-CWA (Chen et al., ICLR 2024; on VLMs: Dong et al. 2023, "Attack-Bard", arXiv 2309.11751), on features.

    Each outer step visits the encoders in turn. On each, the gradient is averaged over 20 spectral samples of the image
    (Gaussian noise of 16/255, cosine coefficients multiplied by U[0.5, 1.5]); an inner momentum of L2-normalised
    gradients moves the image by 250 times itself, which the projection cuts. What the inner steps moved by is
    L1-normalised into an outer momentum, along whose sign the image steps from where it stood. Both momenta keep
    everything (mu 1) and last through the attack. 50 steps of 1/255 as in MultiTrust's targeted setting; Attack-Bard
    has up to 500 of 3.2/255.

    Departures: the goal is the cosine to a target image's features, where Attack-Bard leaves the clean features
    (squared error) and MultiTrust aims at a text; the ensemble is the audited encoder (unless own is false) with the
    public ones named; spectral samples are clamped to [0, 1], which encoders here ask for; momenta are normalised per
    image, where the code's outer one is over the batch.
    """

    encoders: str = param("", "further public encoder sources, by comma; the audited one is not taken twice")
    own: bool = param(True, "the audited encoder is in the ensemble; false: transfer alone")
    steps: int = param(50, "outer steps")
    step_size: float = param(1 / 255, "of the outer steps, in [0, 1] units")
    inner_size: float = param(250.0, "of the inner steps, as Euclidean length in [0, 1] units")
    decay: float = param(1.0, "share of both momenta kept per step")
    samples: int = param(20, "spectral samples per encoder and step")
    sigma: float = param(16 / 255, "standard deviation of their noise, in [0, 1] units")
    rho: float = param(0.5, "how far from 1 a coefficient's factor is drawn")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 1:
            raise ValueError("steps and samples must be at least 1")
        for name in ("step_size", "inner_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("decay", "sigma", "rho"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`. AttackError without target images or any encoder to run on."""
        if view.threat.radius == 0:
            return view.inputs.clone()
        encoders = ensemble(view, own=self.own, named=self.encoders)
        goals = goals_of(encoders, targets_of(view))
        images = view.inputs.clone()
        inner, outer = torch.zeros_like(images), torch.zeros_like(images)
        broken = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        for _ in range(self.steps):
            moved = images
            for encoder, goal in zip(encoders, goals, strict=True):
                gradient = self._gradient(view, encoder, moved, goal)
                broken |= ~gradient.isfinite().flatten(1).all(dim=1)
                gradient = torch.where(broken.view(-1, 1, 1, 1), torch.zeros_like(gradient), gradient)
                inner = self.decay * inner + _unit(gradient, 2)
                moved = view.threat.project(moved + self.inner_size * inner, view.inputs)
            outer = self.decay * outer + _unit(moved - images, 1)
            images = view.threat.project(images + self.step_size * outer.sign(), view.inputs)
        # What no gradient could lead must not pass for robust: the judge turns it into an error.
        images[broken] = torch.nan
        return images

    def _gradient(self, view: EncoderView, encoder: EncoderHandle, images: Tensor, goal: Tensor) -> Tensor:
        """The mean gradient of the cosine at the spectral samples, with respect to each sample's pixels."""
        total = torch.zeros_like(images)
        for _ in range(self.samples):
            noise = self.sigma * view.random.normal(images.shape[1:])
            mask = 1 + self.rho * (2 * view.random.uniform(images.shape[1:]) - 1)
            sample = spectral(images, noise, mask).requires_grad_(True)
            with torch.enable_grad():
                cosine = F.cosine_similarity(encoder.features(sample), goal, dim=1)
                (gradient,) = torch.autograd.grad(cosine.sum(), sample)
            total += gradient
        return total / self.samples


def _unit(change: Tensor, order: int) -> Tensor:
    """Each image's change divided by its own length; zero where it is zero, which dividing would turn into NaN."""
    length = torch.linalg.vector_norm(change, order, dim=(1, 2, 3), keepdim=True)
    return torch.where(length > 0, change / length, torch.zeros_like(change))


SPEC = AttackSpec(
    name="ssa_cwa",
    summary="targeted: spectral samples and the common weakness of an ensemble, towards a target image",
    factory=SSACWA,
    source="Chen et al. 2024, arXiv 2303.09105; Dong et al. 2023, arXiv 2309.11751",
    access="encoder",
    goal="targeted",
    partners=lambda attack: sources_in(attack.encoders),
    aims=True,
)
