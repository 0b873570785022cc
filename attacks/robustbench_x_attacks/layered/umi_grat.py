"""umi_grat: momentum steps on features and on noisy differences of earlier layers, which imitate unknown tuning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.plugin import AttackSpec, Fitted, Trainer, param
from robustbench_x.views import EncoderView, FitView
from robustbench_x_attacks.iterative import Evaluation, ascend
from robustbench_x_attacks.layered.bank import BankTrainer, bank_of
from robustbench_x_attacks.layered.search import candidates_of
from robustbench_x_attacks.layered.tokens import layer_tokens
from robustbench_x_attacks.steps import momentum

__all__ = ["SPEC", "UMIGRAT", "robust_norm"]


@final
@dataclass(frozen=True, kw_only=True)
class UMIGRAT(Fitted):
    """The gradient-robust attack of UMI-GRAT (Xia et al., NeurIPS 2024) without its meta-initialisation.

    One sign step moves an image's pooled features toward the mean of natural images' (there 4/255 of a budget of
    10/255, here 0.4 * eps), then momentum steps ascend the norm of the last layer's difference plus the mean over
    earlier layers of Gaussian noise times their difference, which stands for the unknown change of the weights.

    Departures: the universal start that is meta-learned on 20,000 images is left out; the natural mean is that of the
    surrogate images' pooled features. Where an earlier layer has another shape than the last one (CNN stages), its
    difference is averaged to the last layer's number of tokens and mapped by a random Gaussian matrix to its width,
    which the paper, on ViTs, need not do.
    """

    steps: int = param(10, "gradient steps")
    step_size: float | None = param(None, "in [0, 1] units; default 2 * eps / steps")
    decay: float = param(1.0, "share of the momentum kept per step")
    first: float = param(0.4, "first step toward the natural mean, as a share of the budget")
    robust: bool = param(True, "add the noisy differences of earlier layers; without: momentum steps on the last")
    images: int = param(128, "surrogate images whose features make the natural mean")
    eot: int = param(10, "passes averaged per step when the victim is random")

    def __post_init__(self) -> None:
        if min(self.steps, self.images, self.eot) < 1:
            raise ValueError("steps, images and eot must be at least 1")
        if not 0 <= self.first <= 1:
            raise ValueError(f"first={self.first} must lie in [0, 1]")
        if self.fit_encoder:
            raise ValueError(
                "fit_encoder: the features of another encoder say nothing about this one's; leave it empty"
            )

    def trainer(self, view: FitView) -> Trainer:
        """The features of natural images; access `encoder`."""
        return BankTrainer(view, self.images)

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`.

        Raises:
            AttackError: There is no bank of natural features, or the encoder names no layers.
        """
        if view.threat.radius == 0:
            return view.inputs.clone()
        layers = candidates_of(view.encoder, "block")
        names = layers if self.robust else layers[-1:]
        with torch.no_grad():
            clean = layer_tokens(view.encoder, view.inputs, names)

        def objective(images: Tensor, index: Tensor) -> Evaluation:
            tokens = layer_tokens(view.encoder, images, names)
            change = {name: found - clean[name][index] for name, found in tokens.items()}
            return Evaluation(robust_norm(view, change, index), None)

        size = self.step_size if self.step_size is not None else 2 * view.threat.radius / self.steps
        best = ascend(
            view,
            objective,
            momentum(size, self.decay),
            steps=self.steps,
            random_start=self.first == 0,  # at the clean image every difference, and so the gradient, is zero
            draws=self.eot if view.encoder.stochastic else 1,
            start=self._start(view) if self.first else None,
            random_loss=self.robust,
        )
        return best.images

    def _start(self, view: EncoderView) -> Tensor:
        """One step from the clean images toward the natural mean of the features."""
        natural = bank_of(view, "umi_grat").mean(dim=0)
        images = view.inputs.detach().requires_grad_(True)
        with torch.enable_grad():
            distance = (view.encoder.features(images) - natural).square().sum()
            (gradient,) = torch.autograd.grad(distance, images)
        return view.threat.project(
            view.inputs - self.first * view.threat.radius * view.threat.ascent(gradient), view.inputs
        )


def robust_norm(view: EncoderView, change: Mapping[str, Tensor], index: Tensor) -> Tensor:
    """Norm of the last layer's change plus the mean of noise times the earlier layers' changes, `(N,)`.

    Args:
        view: Whose randomness draws the noise, anew at every call.
        change: Adversarial minus clean tokens `(N, T, D)` by layer, shallow to deep.
        index: The samples at hand.
    """
    *earlier, last = change.values()
    total = last
    for difference in earlier:
        if difference.shape == last.shape:
            noisy = difference * view.random.normal(last.shape[1:], index)
        else:
            pooled = F.adaptive_avg_pool1d(difference.transpose(1, 2), last.shape[1]).transpose(1, 2)
            width = difference.shape[2]
            noisy = pooled @ (view.random.normal((width, last.shape[2]), index) / width**0.5)
        total = total + noisy / len(earlier)
    norms: Tensor = torch.linalg.vector_norm(total.flatten(1), dim=1)
    return norms


SPEC = AttackSpec(
    name="umi_grat",
    summary="momentum on features with noisy differences of earlier layers, against unknown tuning",
    factory=UMIGRAT,
    source="Xia et al. 2024 (NeurIPS), UMI-GRAT without meta-initialisation",
    access="encoder",
    norms=("linf", "l2", "patch"),
    fits=True,
    fitted_by=("images",),
)
