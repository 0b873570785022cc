"""Training patches of photographs of any size: seeded square crops of every scale."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from robustbench_x.data.dataset import Item
from robustbench_x.errors import DataError
from robustbench_x.fitting.ground import Pool
from robustbench_x.randomness import derive_seed

__all__ = ["make_patches"]


def make_patches(source: str, items: Sequence[Item], *, side: int, count: int, seed: int) -> Pool:
    """`count` patches of `side` pixels, as evenly over `items` as can be, each photograph's next to each other.

    A patch is a square of random place and side, from a quarter of the image to the whole (uniform in the logarithm),
    scaled down to `side`: a large photograph shows its detail only from further away. What is smaller than a patch is
    left out and named, and so is what cannot be read.

    Raises:
        DataError: No image serves.
    """
    levels: list[Tensor] = []
    unusable: list[str] = []
    starts: list[int] = []
    order = np.random.default_rng(derive_seed(seed, "patches")).permutation(len(items))
    for place, number in enumerate(order):
        wanted = (count * (place + 1)) // len(items) - (count * place) // len(items)
        if not wanted:
            continue
        try:
            image = items[number].load().convert("RGB")
            if min(image.size) < side:
                raise DataError(f"{items[number].id} is smaller than a patch of {side} pixels")
        except DataError as error:
            unusable.append(str(error))
            continue
        rng = np.random.default_rng(derive_seed(seed, "patch", items[number].id))
        starts.append(len(levels))
        levels += [_patch(image, side, rng) for _ in range(wanted)]
    if not levels:
        raise DataError(f"surrogate {source}: none of {len(items)} images can be used: {(unusable or ['none'])[0]}")
    stacked = torch.stack(levels)
    digest = hashlib.sha256(stacked.numpy().tobytes()).hexdigest()
    return Pool(source=source, levels=stacked, sha256=digest, unreadable=tuple(unusable), starts=tuple(starts))


def _patch(image: PIL.Image.Image, side: int, rng: np.random.Generator) -> Tensor:
    shorter = min(image.size)
    least = max(side, shorter // 4)
    length = min(shorter, round(least * math.exp(rng.random() * math.log(shorter / least))))
    left, top = (int(rng.integers(free + 1)) for free in (image.width - length, image.height - length))
    crop = image.resize((side, side), PIL.Image.Resampling.LANCZOS, box=(left, top, left + length, top + length))
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
