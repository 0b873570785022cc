"""Batch norm over the batch of every process, on any device: torch's own `SyncBatchNorm` is for GPUs alone."""

from typing import final

import torch
from torch import Tensor, nn

from robustbench_x.world import World

__all__ = ["WorldBatchNorm", "share_batch_norm"]


@final
class WorldBatchNorm(nn.Module):
    """What `norm` does, with mean and variance of the rows of all processes, which have equally many; differentiable.

    Weights and running statistics are those of `norm`, under the same names.

    Args:
        norm: With a momentum and running statistics, as they are by default.
        world: The processes.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, world: World) -> None:
        super().__init__()
        self._world = world
        assert norm.momentum is not None, "an average of all batches is not what torch does by default"
        self._eps, self._momentum = norm.eps, norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        self.train(norm.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` `(N, C, ...)`, normalised."""
        shape = (1, -1, *(1,) * (inputs.ndim - 2))
        if self.training:
            mean, variance = self._statistics(inputs.float())
        else:
            mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        scale = (variance + self._eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        normal = (inputs - mean.view(shape)) * scale.view(shape)
        return normal if self.bias is None else normal + self.bias.view(shape)

    def _statistics(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(inputs.ndim) if axis != 1]
        variance, mean = torch.var_mean(inputs, dim=axes, correction=0)
        means, variances = self._world.gather(torch.stack([mean, variance])[None]).unbind(dim=1)
        mean = means.mean(dim=0)
        variance = (variances + (means - mean).square()).mean(dim=0)
        count = inputs.numel() // inputs.shape[1] * self._world.size
        with torch.no_grad():
            self.get_buffer("num_batches_tracked").add_(1)
            self.get_buffer("running_mean").lerp_(mean.detach(), self._momentum)
            self.get_buffer("running_var").lerp_(variance.detach() * count / (count - 1), self._momentum)
        return mean, variance


def share_batch_norm(network: nn.Module, world: World) -> None:
    """Puts a `WorldBatchNorm` in the place of every batch norm inside `network`."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, WorldBatchNorm(child, world))
