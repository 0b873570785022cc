"""Who each sample should be taken for: the harness chooses the target images, so no attack can pick easy ones."""

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from robustbench_x.data.dataset import Item
from robustbench_x.encoders.encoder import Preprocessing
from robustbench_x.errors import AttackError, DataError
from robustbench_x.randomness import derive_seed

__all__ = ["Targets"]


@final
class Targets:
    """A target image for every sample: the next one of another class, and with other captions, in a seeded order.

    So every image is the target of about one other, as where the adversarial images take the places of their targets in
    a gallery. The order depends on ids and seed alone, not on batches or shards. What cannot be read is passed over.

    Args:
        pool: Every evaluated image, of all shards.
        preprocessing: Of the encoder that is attacked.
        seed: The audit's.
    """

    def __init__(self, pool: Sequence[Item], preprocessing: Preprocessing, *, seed: int) -> None:
        order = np.argsort([derive_seed("target", seed, item.id) for item in pool], kind="stable")
        self._order = [pool[i] for i in order]
        self._place = {item.id: place for place, item in enumerate(self._order)}
        self._preprocessing = preprocessing
        self._levels: dict[str, Tensor | None] = {}

    def of(self, item: Item) -> Item | None:
        """The target of `item`; None where no readable image is of another class."""
        start = self._place[item.id]
        for offset in range(1, len(self._order)):
            other: Item = self._order[(start + offset) % len(self._order)]
            said = item.captions and other.captions == item.captions
            if other.label != item.label and not said and self._read(other) is not None:
                return other
        return None

    def images(self, items: Sequence[Item]) -> Tensor:
        """The targets' pixels `(N, 3, H, W)` in [0, 1], on the CPU.

        Raises:
            AttackError: A sample has no target.
        """
        found = [self.of(item) for item in items]
        lacking = [item.id for item, target in zip(items, found, strict=True) if target is None]
        if lacking:
            raise AttackError(f"there is no readable image of another class to aim {lacking[0]} at")
        levels = [self._read(target) for target in found if target is not None]
        return torch.stack([level for level in levels if level is not None]).float().div(255)

    def texts(self, items: Sequence[Item]) -> tuple[str, ...] | None:
        """The first caption of every target; None where one has none."""
        found = [self.of(item) for item in items]
        captions = tuple(target.captions[0] for target in found if target is not None and target.captions)
        return captions if len(captions) == len(items) else None

    def _read(self, item: Item) -> Tensor | None:
        if item.id not in self._levels:
            try:
                self._levels[item.id] = self._preprocessing(item.load()).mul(255).round().to(torch.uint8)
            except DataError:
                self._levels[item.id] = None
        return self._levels[item.id]
