"""Our small decoder: a code book of noise patterns, of which a target's embedding picks a mixture."""

import copy
import math
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CODES", "CompactDecoder", "place_codes"]

CODES = 64
"""Patterns in the book."""
_SIDE = 96
"""Largest side of a pattern in pixels."""
_SHARPNESS = 20.0
"""What cosines are multiplied with before the softmax: about two patterns then share a noise."""
_ROUNDS = 10


@final
class CompactDecoder(nn.Module):
    """Embeddings `(N, width)`, as the encoder gives them, to noise `(N, 3, *size)`, unbounded.

    The released network's first layer, 92 % of its weights, is here the whole of it, factorised: an embedding is
    compared with `codes` places in the encoder's space, and the softmax of the cosines weighs as many patterns of at
    most 96 x 96 pixels, which are tiled over the image. Cosines are taken about the mean embedding, as the features of
    one encoder share a large mean. The places are those of spherical k-means on surrogate embeddings (`place_codes`)
    and stay there; the patterns, which start at nothing, are all that gradients move.

    Why: with convolutions, as published, the noise of every target is the same for the first thousands of steps: what
    all targets have in common has the larger gradient. Patterns of pixels are learned as fast as universal
    perturbations, and the published network, trained on half a million steps, stays available as `official`.

    1.9 million parameters at width 1280, 1.8 at 512, and the same whatever the size from 96 pixels on.

    Args:
        width: Of the embeddings.
        size: (height, width) of the noise.
        codes: Places and patterns.
        side: (height, width) of a pattern; None: the size, at most 96.
    """

    mean: Tensor
    places: Tensor

    def __init__(
        self, width: int, size: tuple[int, int], *, codes: int = CODES, side: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.width, self.size = width, size
        height, across = side or (min(size[0], _SIDE), min(size[1], _SIDE))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("places", F.normalize(torch.randn(codes, width), dim=1))
        self.patterns = nn.Parameter(torch.zeros(codes, 3, height, across))

    def forward(self, features: Tensor) -> Tensor:
        """Noise, unbounded."""
        cosines = F.normalize(features.float() - self.mean, dim=1) @ self.places.T
        weights = (_SHARPNESS * cosines).softmax(dim=1)
        tile: Tensor = (weights @ self.patterns.flatten(1)).view(-1, *self.patterns.shape[1:])
        times = [math.ceil(side / made) for side, made in zip(self.size, tile.shape[-2:], strict=True)]
        tiled = tile.repeat(1, 1, *times)
        return tiled[..., : self.size[0], : self.size[1]]

    @property
    def placed(self) -> bool:
        """Whether `place_codes` was here."""
        return bool(self.mean.any())

    def sized(self, size: tuple[int, int]) -> "CompactDecoder":
        """The same patterns on images of another (height, width)."""
        other = copy.copy(self)
        other.size = size
        return other


@torch.no_grad()
def place_codes(decoder: CompactDecoder, features: Tensor, generator: torch.Generator) -> None:
    """Puts the places of `decoder` where embeddings `(M, width)` are: spherical k-means about their mean.

    Args:
        decoder: On the embeddings' device.
        features: Surrogate embeddings; with fewer than there are codes, the rest stays at random places.
        generator: On the CPU; picks the first places.
    """
    decoder.mean.copy_(features.mean(dim=0))
    directions = F.normalize(features - decoder.mean, dim=1)
    codes = min(len(decoder.places), len(features))
    places = directions[torch.randperm(len(features), generator=generator)[:codes].to(features.device)]
    for _ in range(_ROUNDS):
        nearest = (directions @ places.T).argmax(dim=1)
        sums = torch.zeros_like(places).index_add_(0, nearest, directions)
        empty = torch.bincount(nearest, minlength=codes) == 0
        places = torch.where(empty[:, None], places, F.normalize(sums, dim=1))
    decoder.places[:codes] = places
