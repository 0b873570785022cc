"""X-Transfer: one perturbation against several encoders at once, chosen by a bandit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustbench_x.plugin import AttackSpec, Fitted, Trainer, param
from robustbench_x.views import EncoderView, FitView
from robustbench_x_attacks.universal import terms
from robustbench_x_attacks.universal.pattern import Ascent, SignTrainer, apply_artifact, put_on, step_places

__all__ = ["SPEC", "XTransfer"]

_MEMORY = 0.01
_SWAP = 5


@final
@dataclass(frozen=True, kw_only=True)
class XTransfer(Fitted):
    """X-Transfer (Huang et al., ICML 2025): mean cosine similarity falls on the encoders that resist most.

    Every 5 steps the `chosen` encoders with the largest upper confidence bound (UCB, rho 2) of their current loss are
    taken; the reward is the running mean (memory 0.01) of the cosine similarity, so the least fooled come first. The
    signs of their gradients are averaged. Without `partners` this is the one-encoder cosine objective.

    Departures: public encoders of any kind, where the paper has CLIP image towers; steps, momentum and schedule as
    for the other universal attacks here, where the paper steps 0.5/255 at a budget of 12/255 through one epoch of
    ImageNet; the running mean starts at an encoder's first loss.
    """

    partners: tuple[str, ...] = param((), "sources of further public encoders it is fitted on together")
    chosen: int = param(1, "encoders per step (k)")
    rho: float = param(2.0, "weight of the exploration term")
    steps: int = param(200, "sign steps")
    batch: int = param(16, "surrogate images per step")
    rate: float = param(0.2, "first step size, as a share of the budget")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.chosen < 1:
            raise ValueError("steps, batch and chosen must be at least 1")

    def trainer(self, view: FitView) -> Trainer:
        """A training of the pattern on the encoder and its partners; access `encoder`."""
        return _BanditTrainer(self, view)

    def run(self, view: EncoderView) -> Tensor:
        """Images with the learned pattern on."""
        return apply_artifact(view)


@final
class _BanditTrainer:
    """Sign steps whose direction comes from the encoders the bandit picks; counts and rewards are part of the state."""

    def __init__(self, attack: XTransfer, view: FitView) -> None:
        self._attack = attack
        self._view = view
        self._encoders = (view.encoder, *view.partners)
        self._pulls = torch.zeros(len(self._encoders), dtype=torch.float64)
        self._reward = torch.zeros(len(self._encoders), dtype=torch.float64)
        self._picked = torch.zeros(min(attack.chosen, len(self._encoders)), dtype=torch.long)
        size = min(attack.batch, len(view.surrogate))
        self._ascent = SignTrainer(view, self._improve, steps=attack.steps, batch=size, rate=attack.rate)
        self.steps, self.batch = attack.steps, size

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`."""
        if number % _SWAP == 0:
            self._picked = self._pick(number)
        return self._ascent.step(number, index)

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return {**self._ascent.state(), "pulls": self._pulls, "reward": self._reward, "picked": self._picked}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        self._ascent.restore(state)
        self._pulls, self._reward, self._picked = (state[k].clone() for k in ("pulls", "reward", "picked"))

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return self._ascent.result()

    def _pick(self, number: int) -> Tensor:
        # An encoder that was never asked comes first.
        spread = (math.log(number + 1) / self._pulls.clamp(min=1)).sqrt() * self._attack.rho
        bound = torch.where(self._pulls == 0, torch.inf, self._reward + spread)
        return bound.argsort(descending=True, stable=True)[: len(self._picked)].clone()

    def _improve(self, pattern: Tensor, number: int, index: Tensor) -> Ascent:
        view, clean = self._view, self._view.surrogate.batch(index)
        signs, similarities = [], []
        for arm in self._picked.tolist():
            encoder = self._encoders[arm]
            with torch.no_grad():
                kept = encoder.features(clean)
            with torch.enable_grad():
                variable = pattern.detach().requires_grad_(True)
                images = put_on(clean, variable, view.threat, places=step_places(view, number))
                similarity = terms.cosine(encoder.features(images), kept)
                (gradient,) = torch.autograd.grad(similarity, variable)
            signs.append(-gradient.sign())
            similarities.append(similarity.detach())
            seen = float(similarities[-1])
            first = self._pulls[arm] == 0
            self._reward[arm] = seen if first else (1 - _MEMORY) * self._reward[arm] + _MEMORY * seen
            self._pulls[arm] += 1
        return Ascent(torch.stack(signs).mean(dim=0), {"adv": torch.stack(similarities).mean()})


SPEC = AttackSpec(
    name="xtransfer",
    summary="universal: cosine similarity on several encoders, picked by a bandit",
    factory=XTransfer,
    source="Huang et al. 2025, X-Transfer Attacks, arXiv 2505.05528",
    access="encoder",
    norms=("linf", "patch"),
    fits=True,
    partners=lambda attack: attack.partners,
)
