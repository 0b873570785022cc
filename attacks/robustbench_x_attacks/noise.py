"""The noise control: what the budget alone costs, with no idea of the model."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from robustbench_x.plugin import AttackSpec
from robustbench_x.views import ImageView

__all__ = ["SPEC", "Noise"]


@final
@dataclass(frozen=True, kw_only=True)
class Noise:
    """Random signs at the full eps (linf), a random point on the sphere (l2), a uniform patch (patch)."""

    def run(self, view: ImageView) -> Tensor:
        """One draw per sample; access `none`."""
        return view.threat.noise(view.inputs, view.random)


SPEC = AttackSpec(
    name="noise",
    summary="control: random signs at full eps, a point on the sphere, a uniform patch",
    factory=Noise,
    source="Carlini et al. 2019, On Evaluating Adversarial Robustness (noise baseline)",
    access="none",
    norms=("linf", "l2", "patch"),
    control=True,
)
