"""pruning: the smallest weights of an encoder set to zero, as a user of it might (AdvEncoder's user-side defence)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from robustbench_x.hardening import HardeningSpec, HardenView
from robustbench_x.plugin import Trainer, param

__all__ = ["SPEC", "Pruning", "prunable", "prune"]

_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.MultiheadAttention,
)
_WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@final
@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Parameter pruning of the encoder (a user-side defence in Zhou et al. 2023, AdvEncoder, arXiv 2307.12280).

    Sets the share `amount` of all convolution and linear weights to zero, those of smallest absolute value in the
    whole encoder (global, unstructured, L1), once and without any training after. Biases, norms, embeddings and class
    tokens stay. It needs no image, no attack, no budget and no seed: the same encoder is pruned to the same weights.

    The paper prunes at rates from 0.1 to 0.7 and finds that its attack survives. Its released code holds none of its
    defences, so what follows is ours and no figure here is comparable with the paper's.

    Departures:
        The criterion, one threshold for the whole encoder, is ours; so is the default rate.
        Heads are fitted on the pruned encoder, as its user would who prunes what was downloaded. A head that was
        fitted before the pruning is `-H native`, where the encoder has one.
        An attacker of the audit has the pruned weights. One who knows only the published encoder is
        `fit_encoder=` of a universal attack.

    Limits: a convolution that standardises its weights when it runs (as in BiT) moves the zeros again; and a weight
    that is computed from others (a parametrisation) is left alone.
    """

    amount: float = param(0.3, "share of the weights set to zero, above 0 and below 1; published: 0.1 to 0.7")

    def __post_init__(self) -> None:
        if not 0 < self.amount < 1:
            raise ValueError(f"amount={self.amount} must lie above 0 and below 1")

    def trainer(self, view: HardenView) -> Trainer:
        """A training of one step, which looks at no image."""
        return _Pruner(view.backbone, self.amount)


def prunable(network: nn.Module) -> list[nn.Parameter]:
    """The weights of all convolutions, linear layers and attention projections, each once, in the modules' order."""
    found: dict[int, nn.Parameter] = {}
    for module in network.modules():
        if isinstance(module, _LAYERS):
            for name, weight in module.named_parameters(recurse=False):
                if name in _WEIGHTS and weight.is_floating_point():
                    found.setdefault(id(weight), weight)
    return list(found.values())


@torch.no_grad()
def prune(weights: list[nn.Parameter], amount: float) -> float:
    """Zeroes the `round(amount * n)` smallest of the n entries of all `weights`, in place.

    Returns:
        The share of entries that are zero now: `amount` to the nearest entry, or more where there were more before.

    Raises:
        ValueError: There is no entry.
    """
    if not weights:
        raise ValueError("the encoder has no convolution and no linear weight to prune")
    sizes = torch.cat([weight.detach().abs().float().flatten() for weight in weights])
    gone = torch.zeros_like(sizes, dtype=torch.bool)
    gone[sizes.topk(round(amount * len(sizes)), largest=False, sorted=False).indices] = True
    for weight, mask in zip(weights, torch.split(gone, [weight.numel() for weight in weights]), strict=True):
        weight.masked_fill_(mask.view_as(weight), 0.0)  # a product would leave minus zeros
    return sum(int((weight == 0).sum()) for weight in weights) / len(sizes)


@final
class _Pruner:
    """One step that prunes; everything it depends on are the weights."""

    steps, batch = 1, 0

    def __init__(self, network: nn.Module, amount: float) -> None:
        self._network, self._amount = network, amount

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`: the share of zeros."""
        return {"pruned": torch.tensor(prune(prunable(self._network), self._amount))}

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`: the weights."""
        return self.result()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        self._network.load_state_dict(dict(state), strict=True)

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`: the state dict of the pruned encoder."""
        return {name: tensor.detach().clone() for name, tensor in self._network.state_dict().items()}


SPEC = HardeningSpec(
    name="pruning",
    summary="the smallest convolution and linear weights set to zero; no image, no attack",
    factory=Pruning,
    source="Zhou et al. 2023, AdvEncoder (ICCV), arXiv 2307.12280, user-side defence (criterion ours)",
    attacked=False,
)
