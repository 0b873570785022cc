"""dta_training: an encoder trained on the images of a downstream transfer attack (after Zheng et al. 2024)."""

from dataclasses import dataclass
from typing import final

from robustbench_x.hardening import HardeningSpec, HardenView
from robustbench_x.plugin import Trainer, param
from robustbench_x_defenses.hardening.embedding import EmbeddingTrainer, Recipe

__all__ = ["SPEC", "DTATraining"]


@final
@dataclass(frozen=True, kw_only=True)
class DTATraining(Recipe):
    """Adversarial training on DTA images (after Zheng et al. 2024, arXiv 2408.01705; the design is ours).

    The paper claims that training on its examples hardens an encoder against other downstream transfer attacks. How
    it trains is not known to us, so this is FARE's training (see `fare`, with its departures) on the images of `dta`:
    the attack turns the tokens of the most vulnerable layers, which it searches once on the original encoder, and
    the training keeps the pooled embedding where it was. Nothing here reproduces a figure of the paper.

    Whether the claim holds is told by attacks that were not trained on: audit the result with `embed`, `nrdm` and the
    others, and against `fare` at equal cost.
    """

    inner: str = param("dta?steps=3", "attack that makes the images, with its parameters")

    def trainer(self, view: HardenView) -> Trainer:
        """A training from its start."""
        return EmbeddingTrainer(view, self)


SPEC = HardeningSpec(
    name="dta_training",
    summary="the training of fare on the images of dta: does it harden against other transfer attacks?",
    factory=DTATraining,
    source="after Zheng et al. 2024, arXiv 2408.01705 (our design)",
)
