"""One attack and one defence, outside the distribution that runs them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from robustbench_x.plugin import AttackSpec, DefenseSpec, param
from robustbench_x.views import WhiteboxView

if TYPE_CHECKING:
    from robustbench_x.registry import Registry

__all__ = ["FGSM", "Dim", "register"]


@final
@dataclass(frozen=True, kw_only=True)
class FGSM:
    """One signed step on the cross-entropy (Goodfellow et al. 2015)."""

    scale: float = param(1.0, "share of the budget that is spent")

    def run(self, view: WhiteboxView) -> Tensor:
        """Adversarial images; access `whitebox`."""
        images = view.inputs.clone().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(view.model(images), view.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
        step = self.scale * view.threat.radius * gradient.sign()
        return view.threat.project(view.inputs + step, view.inputs)


@final
@dataclass(frozen=True, kw_only=True)
class Dim:
    """Darkens every image a little."""

    factor: float = param(0.9, "brightness kept")

    def apply(self, images: Tensor) -> Tensor:
        """Images times `factor`."""
        return self.factor * images


def register(registry: "Registry") -> None:
    """Adds both."""
    registry.add_attack(
        AttackSpec(
            name="example_fgsm",
            summary="one signed gradient step",
            factory=FGSM,
            source="Goodfellow et al. 2015, arXiv 1412.6572",
            access="whitebox",
        )
    )
    registry.add_defense(DefenseSpec(name="example_dim", summary="darkens images", factory=Dim, source="tests"))
