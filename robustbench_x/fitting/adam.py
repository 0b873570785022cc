"""The moments of an Adam-like optimizer as named tensors, for the checkpoints of trainings."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["optimizer_state", "restore_optimizer"]


def optimizer_state(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], prefix: str) -> dict[str, Tensor]:
    """What `optimizer` remembers of `weights`, each as `PREFIX<place>.<name>`."""
    return {
        f"{prefix}{place}.{name}": tensor
        for place, weight in enumerate(weights)
        for name, tensor in optimizer.state.get(weight, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], prefix: str, state: Mapping[str, Tensor]
) -> None:
    """Gives `optimizer` back what `optimizer_state` returned."""
    for place, weight in enumerate(weights):
        own = f"{prefix}{place}."
        moments = {name.removeprefix(own): t for name, t in state.items() if name.startswith(own)}
        if moments:
            # In the weight's own memory layout, as the optimizer would have made them.
            optimizer.state[weight] = {
                name: torch.empty_like(weight, requires_grad=False).copy_(t) if t.ndim else t.clone()
                for name, t in moments.items()
            }
