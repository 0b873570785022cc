"""A bank of surrogate features: what an attacker knows of natural images without any label."""

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.views import EncoderView, FitView

__all__ = ["BANK", "BankTrainer", "bank_of"]

BANK = "bank"
"""The artefact's tensor, `(M, D)`."""
_BATCH = 16


@final
class BankTrainer:
    """Encodes surrogate images; nothing is optimised.

    Args:
        view: What the training is handed.
        images: How many, at most.
    """

    def __init__(self, view: FitView, images: int) -> None:
        count = min(images, len(view.surrogate))
        self.batch = min(_BATCH, count)
        self.steps = math.ceil(count / self.batch)
        self._view = view
        self._rows = torch.zeros(count, view.encoder.feature_dim)

    @torch.no_grad()
    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`; the term is the mean norm of the features."""
        first = number * self.batch
        index = index[: len(self._rows) - first]
        features = self._view.encoder.features(self._view.surrogate.batch(index)).cpu()
        if not features.isfinite().all():
            raise AttackError(f"the features of surrogate batch {number} hold NaN or infinity")
        self._rows[first : first + len(index)] = features
        return {"norm": features.norm(dim=1).mean()}

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return {"rows": self._rows}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        self._rows = state["rows"].clone()

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return {BANK: self._rows}


def bank_of(view: EncoderView, name: str) -> Tensor:
    """The bank `(M, D)` that the attack called `name` learned.

    Raises:
        AttackError: There is none, or it is of features of another width.
    """
    bank = None if view.artifact is None else view.artifact.get(BANK)
    if bank is None or bank.ndim != 2 or bank.shape[1] != view.encoder.feature_dim:
        raise AttackError(f"{name} needs a bank of this encoder's features, which rbx audit or rbx fit makes")
    return bank
