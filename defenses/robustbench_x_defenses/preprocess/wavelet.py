"""Wavelet denoising with BayesShrink thresholds, differentiable (Chang et al. 2000)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["denoise"]

# ITU-R BT.601 luma and the two colour differences. Their scale does not matter: thresholds scale along.
_LUMA = (0.299, 0.587, 0.114)
_TO_YCC = (_LUMA, (-_LUMA[0], -_LUMA[1], 1 - _LUMA[2]), (1 - _LUMA[0], -_LUMA[1], -_LUMA[2]))
# One level of the orthonormal Haar transform on 2 x 2 pixels in reading order; it is its own inverse.
_HAAR = ((0.5, 0.5, 0.5, 0.5), (0.5, -0.5, 0.5, -0.5), (0.5, 0.5, -0.5, -0.5), (0.5, -0.5, -0.5, 0.5))


def denoise(images: Tensor, sigma: float) -> Tensor:
    """Images `(N, 3, H, W)` without what may be noise of standard deviation `sigma`; not clipped.

    Haar wavelets (db1) in luma and colour differences, with three levels fewer than the image allows, at least one. The
    details of every level, direction and channel are soft-thresholded at sigma^2 / sqrt(mean square - sigma^2). An odd
    side is continued by its last row or column. That is scikit-image's
    `denoise_wavelet(convert2ycbcr=True, method="BayesShrink", mode="soft")`.
    """
    to_ycc = torch.tensor(_TO_YCC, device=images.device, dtype=images.dtype)
    variance = sigma**2 * to_ycc.square().sum(dim=1)
    levels = max(math.floor(math.log2(min(images.shape[-2:]))) - 3, 1)
    shrunk = _shrink(_mix(to_ycc, images), variance.view(3, 1, 1, 1), levels)
    return _mix(torch.linalg.inv(to_ycc), shrunk)


def _shrink(channels: Tensor, variance: Tensor, levels: int) -> Tensor:
    if not levels:
        return channels
    height, width = channels.shape[-2:]
    padded = F.pad(channels, (0, width % 2, 0, height % 2), mode="replicate")
    haar = torch.tensor(_HAAR, device=channels.device, dtype=channels.dtype)
    quads = F.pixel_unshuffle(padded, 2).view(len(padded), 3, 4, *(side // 2 for side in padded.shape[-2:]))
    bands = torch.einsum("kj,ncjhw->nckhw", haar, quads)
    coarse, details = bands[:, :, :1], bands[:, :, 1:]
    signal = details.square().mean(dim=(-2, -1), keepdim=True) - variance
    threshold = variance * signal.clamp(min=torch.finfo(signal.dtype).eps).rsqrt()
    details = details.sign() * F.relu(details.abs() - threshold)
    coarse = _shrink(coarse.squeeze(2), variance, levels - 1).unsqueeze(2)
    bands = torch.einsum("kj,ncjhw->nckhw", haar, torch.cat([coarse, details], dim=2))
    return F.pixel_shuffle(bands.flatten(1, 2), 2)[..., :height, :width]


def _mix(matrix: Tensor, images: Tensor) -> Tensor:
    return torch.einsum("kc,nchw->nkhw", matrix, images)
