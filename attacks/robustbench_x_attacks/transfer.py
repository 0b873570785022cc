"""transfer: features of other public encoders pushed away, in the hope that the victim's follow."""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.plugin import AttackSpec, param
from robustbench_x.views import EncoderView
from robustbench_x_attacks.iterative import Evaluation, ascend
from robustbench_x_attacks.steps import momentum

__all__ = ["SPEC", "Transfer"]


@final
@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Momentum sign ascent on the mean cosine distance of other encoders' pooled features (an ensemble).

    It never asks the victim anything, so a defence cannot mislead it: what breaks under it and not under white-box
    attacks tells of masked gradients. Momentum as in MI-FGSM, averaged over surrogates (Dong et al. 2018), on features
    in place of logits, from a random start: at the clean image the gradient is exactly zero. A partner of another input
    size sees the images resized.
    """

    encoders: str = param(
        "packaged:efficientnet_lite0,packaged:dinov2_vits14?size=98",
        "public encoder sources, by comma; the victim's own is left out",
    )
    steps: int = param(10, "gradient steps")
    step_size: float | None = param(None, "in [0, 1] units; default 1.5 * eps / steps")
    decay: float = param(1.0, "share of the momentum kept per step")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not self.sources:
            raise ValueError("encoders names no source")

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources named."""
        return tuple(source.strip() for source in self.encoders.split(",") if source.strip())

    def run(self, view: EncoderView) -> Tensor:
        """Adversarial images; access `encoder`, of which only the digest is read."""
        partners = [partner for partner in view.partners if partner.sha256 != view.encoder.sha256]
        if not partners:
            raise AttackError(f"transfer has no encoder but the victim's own ({self.encoders}); name another")
        with torch.no_grad():
            clean = [partner.features(view.inputs) for partner in partners]

        def objective(images: Tensor, index: Tensor) -> Evaluation:
            distances = [
                1 - F.cosine_similarity(partner.features(images), held[index], dim=1)
                for partner, held in zip(partners, clean, strict=True)
            ]
            return Evaluation(torch.stack(distances).mean(dim=0), None)

        size = self.step_size if self.step_size is not None else 1.5 * view.threat.radius / self.steps
        rule = momentum(size, self.decay)
        return ascend(view, objective, rule, steps=self.steps, random_start=True).images


SPEC = AttackSpec(
    name="transfer",
    summary="features of other public encoders pushed away; never asks the victim",
    factory=Transfer,
    source="Dong et al. 2018, arXiv 1710.06081 (ensemble with momentum); on features, ours",
    access="encoder",
    norms=("linf", "l2", "patch"),
    partners=lambda attack: attack.sources,
)
