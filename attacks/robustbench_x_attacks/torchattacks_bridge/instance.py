"""torchattacks with the encoder alone: every attacked image is a class of its own among natural images."""

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.plugin import Fitted, Trainer, param
from robustbench_x.views import EncoderView, FitView, Meter, ModelHandle, WhiteboxView
from robustbench_x_attacks.layered.bank import BankTrainer, bank_of
from robustbench_x_attacks.torchattacks_bridge.bridge import Bridge
from robustbench_x_attacks.torchattacks_bridge.catalogue import ENTRIES

__all__ = ["INSTANCE_ENTRIES", "InstanceBridge", "InstanceHead"]

_NAMES = ("PGD", "MIFGSM", "VMIFGSM", "DIFGSM", "TIFGSM")
"""Attacks that always send the whole batch in its order, so that each row is known to be its image's."""

INSTANCE_ENTRIES = tuple(entry.replace(targets="") for entry in ENTRIES if entry.name in _NAMES)


@dataclass(frozen=True, kw_only=True)
class InstanceParams(Fitted):
    """What an instance head is made of, beside the attack's own parameters."""

    images: int = param(128, "surrogate images that an image is told apart from")
    temperature: float = param(0.1, "cosines are divided by this to make logits")
    eot: int = param(10, "passes averaged per step when the victim is random")

    def trainer(self, view: FitView) -> Trainer:
        """The features of natural images; access `encoder`."""
        return BankTrainer(view, self.images)


class InstanceBridge(Bridge):
    """Base of every `instance:NAME`; a subclass adds the entry, its parameters and those of `InstanceParams`."""

    family = "instance"

    def __post_init__(self) -> None:
        super().__post_init__()
        values: Any = self
        if min(values.images, values.eot) < 1 or not values.temperature > 0:
            raise ValueError("images and eot must be at least 1 and temperature above 0")
        if values.fit_encoder:
            raise ValueError(
                "fit_encoder: the features of another encoder say nothing about this one's; leave it empty"
            )

    def run(self, view: EncoderView) -> Tensor:  # type: ignore[override]  # an encoder's view instead of a victim's
        """Adversarial images; access `encoder`.

        Raises:
            AttackError: As for the attack itself, or there is no bank of natural features.
        """
        if not len(view.inputs) or view.threat.eps == 0:
            return view.inputs.clone()
        values: Any = self
        draws = values.eot if view.encoder.stochastic else 1
        head = InstanceHead(view, bank_of(view, f"instance:{self.entry.name}"), values.temperature, draws)
        posed = WhiteboxView(
            inputs=view.inputs,
            threat=view.threat,
            random=view.random,
            exhaustive=view.exhaustive,
            labels=torch.zeros(len(view.inputs), dtype=torch.long, device=view.inputs.device),
            # The encoder's own handle counts the passes; this meter only stands in.
            model=ModelHandle(head, Meter(), stochastic=view.encoder.stochastic),
            num_classes=head.num_classes,
        )
        return super().run(posed)


@final
class InstanceHead:
    """Images to logits `(N, 1 + M)`: cosines to the image's own clean features, then to the bank's, over a temperature.

    Class 0 is an image itself, so an untargeted attack drives it away from itself and toward other natural images.

    Args:
        view: The clean images and the encoder.
        bank: `(M, D)` features of natural images.
        temperature: Divides the cosines.
        draws: Passes whose features are averaged, for a defence that draws anew each time.
    """

    def __init__(self, view: EncoderView, bank: Tensor, temperature: float, draws: int = 1) -> None:
        self._encoder = view.encoder
        self._draws = draws
        self._temperature = temperature
        self._bank = F.normalize(bank, dim=1)
        with torch.no_grad():
            self._own = self._unit(view.inputs)
        self.num_classes = 1 + len(bank)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of `images`, which are the view's, in their order.

        Raises:
            AttackError: They are more or fewer, so that no row can be told whose it is.
        """
        if len(images) != len(self._own):
            raise AttackError(
                f"the attack sent {len(images)} of {len(self._own)} images at once; rows must keep places"
            )
        features = self._unit(images)
        own = (features * self._own).sum(dim=1, keepdim=True)
        return torch.cat([own, features @ self._bank.T], dim=1) / self._temperature

    def _unit(self, images: Tensor) -> Tensor:
        features = torch.stack([self._encoder.features(images) for _ in range(self._draws)])
        return F.normalize(features.mean(dim=0), dim=1)
