"""What an encoder makes of labelled images, decoded in parts and cached by content."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_x import cache
from robustbench_x.data.dataset import Item
from robustbench_x.encoders.encoder import Encoder
from robustbench_x.errors import DataError

__all__ = ["Advance", "Features", "content_digest", "features_of", "fingerprint"]

_CHUNK = 256

Advance = Callable[[int, int], None]
"""Told how many images of how many are done."""


class Features(NamedTuple):
    """What an encoder makes of labelled images."""

    features: Tensor
    """`(N, D)` float32 on the CPU."""
    labels: Tensor
    """`(N,)` int64, in the order of the readable items."""
    unreadable: tuple[str, ...]
    """Why each item that could not be decoded could not be; those have no row above."""
    levels: Tensor | None = None
    """The pixels `(N, 3, H, W)` uint8 themselves, where they were asked for."""


@torch.no_grad()
def features_of(
    encoder: Encoder,
    items: Sequence[Item],
    *,
    batch_size: int,
    device: torch.device,
    progress: Advance | None = None,
    keep_pixels: bool = False,
) -> Features:
    """Features of `items`, in their order, cached on disk by content.

    The cache knows the decoded pixels, the weights' digest and what the encoder answers to two random images,
    so neither a changed picture nor a `python:` encoder with changed code meets an old entry. Pixels are held
    for 256 images at a time, whatever the data set's size, and an interrupted run resumes there.

    Args:
        encoder: In eval mode, on `device`.
        items: What to encode; one whose `load` raises `DataError` is named in `unreadable`.
        batch_size: Images per forward pass.
        device: Where the encoder is.
        progress: Told after every 256 items.
        keep_pixels: Return the decoded pixels too, on the CPU: 150 kB for an image of 224 x 224.
    """
    known = fingerprint(encoder, device)
    features, labels, unreadable = [torch.empty(0, encoder.feature_dim)], [], []
    kept = [torch.empty((0, 3, *encoder.input_size), dtype=torch.uint8)]
    for start in range(0, len(items), _CHUNK):
        levels = []
        for item in items[start : start + _CHUNK]:
            try:
                pixels = encoder.preprocessing(item.load())
            except DataError as error:
                unreadable.append(str(error))
                continue
            levels.append(pixels.mul(255).round().to(torch.uint8))
            labels.append(item.label)
        if levels:
            stacked = torch.stack(levels)
            features.append(_encode(encoder, stacked, known, batch_size, device))
            kept += [stacked] if keep_pixels else []
        if progress:
            progress(min(start + _CHUNK, len(items)), len(items))
    return Features(
        torch.cat(features),
        torch.tensor(labels, dtype=torch.long),
        tuple(unreadable),
        torch.cat(kept) if keep_pixels else None,
    )


@torch.no_grad()
def fingerprint(encoder: Encoder, device: torch.device) -> str:
    """A digest of what `encoder`, on `device`, answers to two random images: there changed code shows, too."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *encoder.input_size, generator=generator)
    return content_digest(encoder(images.to(device)).cpu())


def content_digest(*parts: object) -> str:
    """A digest of CPU tensors by their bytes and of everything else by its text."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.contiguous().numpy().tobytes() if isinstance(part, Tensor) else str(part).encode()
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def _encode(encoder: Encoder, levels: Tensor, known: str, batch_size: int, device: torch.device) -> Tensor:
    key = "features-" + content_digest(encoder.sha256, known, tuple(levels.shape), levels)
    stored = cache.load(key)
    if stored:
        return stored.tensors["features"]
    parts = [encoder(part.to(device).float().div(255)).cpu() for part in torch.split(levels, batch_size)]
    features = torch.cat(parts)
    cache.save(key, {"features": features})
    return features
