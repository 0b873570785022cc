"""What the adversarial fine-tunings share: AdamW on a loss of the student's and the teacher's embeddings."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustbench_x.fitting.adam import optimizer_state, restore_optimizer
from robustbench_x.hardening import HardenView
from robustbench_x.plugin import param

__all__ = ["EmbeddingTrainer", "Loss", "Recipe", "embedding_loss", "rate_at"]

_WEIGHTS, _ADAM = "weights.", "adam."

Loss = Callable[[Tensor, Tensor], Tensor]
"""The student's embeddings and the teacher's of the same images, clean, `(N, D)` each, to what is minimised, 0-d."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parameters of every training of this kind."""

    steps: int = param(200, "optimisation steps; published: 20000")
    batch: int = param(16, "surrogate images per step; published: 128")
    rate: float = param(5e-4, "AdamW's highest rate; published, for its many more steps: 1e-5")
    decay: float = param(1e-4, "AdamW's weight decay")
    warmup: float = param(0.07, "share of the steps in which the rate rises, before it falls along a cosine")
    clean: float = param(0.0, "weight of the same loss for clean images; published: 0")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError("steps and batch must be at least 1")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise ValueError(f"rate={self.rate} must be positive")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup={self.warmup} must lie between 0 and 1")
        if not (self.decay >= 0 and self.clean >= 0):
            raise ValueError("decay and clean must not be negative")


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared Euclidean distance of embeddings `(N, D)`, summed over D and averaged over N: 0-d."""
    return (student - teacher).square().sum(dim=1).mean()


def rate_at(number: int, recipe: Recipe) -> float:
    """The rate of step `number`: linear to its highest over the warm-up, then along half a cosine towards zero."""
    rise = round(recipe.warmup * recipe.steps)
    if number < rise:
        return recipe.rate * (number + 1) / rise
    return recipe.rate * 0.5 * (1 + math.cos(math.pi * (number - rise) / (recipe.steps - rise)))


@final
class EmbeddingTrainer:
    """AdamW on a loss between the student's adversarial and the teacher's clean embeddings.

    All randomness is the harness's: its batches and its adversarial images.

    Args:
        view: What a hardening is handed.
        recipe: The parameters.
        loss: What is minimised; the same at every step.
    """

    def __init__(self, view: HardenView, recipe: Recipe, loss: Loss = embedding_loss) -> None:
        self.steps = recipe.steps
        self.batch = min(recipe.batch, len(view.surrogate))
        self._view = view
        self._recipe = recipe
        self._loss = loss
        self._weights = [weight for weight in view.backbone.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._weights, lr=recipe.rate, weight_decay=recipe.decay)

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`."""
        view = self._view
        clean = view.surrogate.batch(index)
        adversarial = view.examples(clean, number)
        with torch.no_grad():
            wanted = view.teacher.features(clean)
        with torch.enable_grad():
            terms = {"adv": self._loss(view.student.features(adversarial), wanted)}
            total = terms["adv"]
            if self._recipe.clean:
                terms["clean"] = self._loss(view.student.features(clean), wanted)
                total = total + self._recipe.clean * terms["clean"]
        self._optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(number, self._recipe)
        self._optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`: the weights and AdamW's moments."""
        held = {f"{_WEIGHTS}{name}": tensor for name, tensor in self._view.backbone.state_dict().items()}
        held |= optimizer_state(self._optimizer, self._weights, _ADAM)
        return held

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        weights = {name.removeprefix(_WEIGHTS): t for name, t in state.items() if name.startswith(_WEIGHTS)}
        self._view.backbone.load_state_dict(weights, strict=True)
        restore_optimizer(self._optimizer, self._weights, _ADAM, state)

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`: the state dict of the student."""
        return {name: tensor.detach().clone() for name, tensor in self._view.backbone.state_dict().items()}
