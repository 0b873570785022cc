"""Random numbers that depend on the run seed, the attack and the sample, and on nothing else.

One generator per sample, on the CPU: the batch size, the device, the other images of the batch and the
samples that already left it cannot change a draw. That is what makes resume and sharding exact.
"""

import hashlib
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

__all__ = ["SampleRandom", "derive_seed"]


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine.

    >>> derive_seed(0, "pgd", "img1") == derive_seed(0, "pgd", "img1")
    True
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@final
class SampleRandom:
    """One random stream per sample of a batch.

    Args:
        seeds: One seed per sample.
        device: Where draws are returned; they are always made on the CPU.
    """

    def __init__(self, seeds: Sequence[int], *, device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = torch.device(device)
        self.seed = derive_seed(*seeds)
        """One seed for the whole batch, for code that knows only a global generator."""

    def __len__(self) -> int:
        return len(self._generators)

    def uniform(self, shape: Sequence[int], index: Tensor | None = None) -> Tensor:
        """Uniform draws in [0, 1), shape `(samples, *shape)`; `index` names the samples that draw."""
        return self._stack([torch.rand(tuple(shape), generator=g) for g in self._pick(index)], shape)

    def normal(self, shape: Sequence[int], index: Tensor | None = None) -> Tensor:
        """Standard normal draws, shape `(samples, *shape)`; `index` names the samples that draw."""
        return self._stack([torch.randn(tuple(shape), generator=g) for g in self._pick(index)], shape)

    def signs(self, shape: Sequence[int], index: Tensor | None = None) -> Tensor:
        """Draws of -1 or +1, shape `(samples, *shape)`."""
        return (self.uniform(shape, index) < 0.5).float().mul_(2).sub_(1)

    def _pick(self, index: Tensor | None) -> list[torch.Generator]:
        if index is None:
            return self._generators
        return [self._generators[i] for i in index.tolist()]

    def _stack(self, draws: list[Tensor], shape: Sequence[int]) -> Tensor:
        if not draws:
            return torch.empty((0, *shape), device=self._device)
        return torch.stack(draws).to(self._device)
