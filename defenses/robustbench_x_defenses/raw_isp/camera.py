"""A model camera: how linear sensor values and sRGB turn into each other (after Brooks et al., CVPR 2019)."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["CAMERA", "Camera", "smoothstep", "smoothstep_inverse"]

BLACK = 64 / 1020
"""Black level of packed RAW in [0, 1]: 64 of a 10-bit sensor, in the scale value / 1020 of the released data."""

_SRGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_XYZ_TO_CAMERA = (
    ((1.0234, -0.2969, -0.2266), (-0.5625, 1.6328, -0.0469), (-0.0703, 0.2188, 0.6406)),
    ((0.4913, -0.0541, -0.0202), (-0.613, 1.3513, 0.2906), (-0.1564, 0.2151, 0.7183)),
    ((0.838, -0.263, -0.0639), (-0.2887, 1.0725, 0.2496), (-0.0627, 0.1427, 0.5438)),
    ((0.6596, -0.2079, -0.0562), (-0.4782, 1.3016, 0.1933), (-0.097, 0.1581, 0.5181)),
)
"""Four cameras' XYZ to camera matrices, as published with Brooks et al. (2019)."""
_FLOOR = 1e-8
_GAMMA = 2.2


def smoothstep(x: Tensor) -> Tensor:
    """The tone curve 3 x^2 - 2 x^3 of values in [0, 1]."""
    return 3 * x**2 - 2 * x**3


def smoothstep_inverse(y: Tensor) -> Tensor:
    """The tone curve undone."""
    return 0.5 - torch.sin(torch.asin(1 - 2 * y) / 3)


@final
@dataclass(frozen=True, kw_only=True)
class Camera:
    """Gains and colour matrix of one camera and one light.

    Brooks et al. draw them anew for every image, so that a denoiser meets many cameras. A defence deploys one, and F
    could only learn the mean of many; so this project's training and its S share the mean of the published draws.

    Args:
        rgb_gain: Digital gain of all colours; published draw 1 / N(0.8, 0.1).
        red_gain: White balance; published draw U(1.9, 2.4).
        blue_gain: White balance; published draw U(1.5, 1.9).
        mix: Weights of the four published colour matrices.
    """

    rgb_gain: float = 1 / 0.8
    red_gain: float = 2.15
    blue_gain: float = 1.7
    mix: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25)

    def from_srgb(self) -> Tensor:
        """Linear sRGB to camera RGB, `(3, 3)`, rows summing to 1."""
        weights = torch.tensor(self.mix, dtype=torch.float64)
        to_camera = (weights.view(-1, 1, 1) * torch.tensor(_XYZ_TO_CAMERA, dtype=torch.float64)).sum(dim=0)
        matrix = to_camera @ torch.tensor(_SRGB_TO_XYZ, dtype=torch.float64)
        return matrix / matrix.sum(dim=1, keepdim=True)

    def unprocess(self, rgb: Tensor) -> Tensor:
        """Linear camera RGB in [0, 1] of sRGB images in [0, 1], both `(N, 3, H, W)`.

        Tone curve, gamma, colour matrix and gains are undone in this order. Highlights keep their value where undoing
        the gains would dim them (the published safe gain).
        """
        linear = smoothstep_inverse(rgb.clamp(0, 1)).clamp(min=_FLOOR) ** _GAMMA
        camera = _colours(linear, self.from_srgb())
        gain = torch.tensor([1 / self.red_gain, 1.0, 1 / self.blue_gain]).to(rgb) / self.rgb_gain
        gain = gain.view(1, 3, 1, 1)
        bright = ((camera.mean(dim=1, keepdim=True) - 0.9).clamp(min=0) / 0.1) ** 2
        return (camera * torch.maximum(bright + (1 - bright) * gain, gain)).clamp(0, 1)

    def balance(self, camera: Tensor) -> Tensor:
        """Camera RGB with its gains applied, clipped at white, `(N, 3, H, W)`."""
        gain = torch.tensor([self.red_gain, 1.0, self.blue_gain]).to(camera) * self.rgb_gain
        return (camera * gain.view(1, 3, 1, 1)).clamp(0, 1)

    def develop(self, balanced: Tensor) -> Tensor:
        """sRGB in [0, 1] of balanced camera RGB `(N, 3, H, W)`: colour matrix, gamma, tone curve."""
        linear = _colours(balanced, torch.linalg.inv(self.from_srgb())).clamp(0, 1)
        return smoothstep(linear.clamp(min=_FLOOR) ** (1 / _GAMMA))

    def process(self, camera: Tensor) -> Tensor:
        """sRGB of linear camera RGB. With the rgb gain and the tone curve, which the published code leaves out, it
        undoes `unprocess` but for highlights that the gains or the clip saturate."""
        return self.develop(self.balance(camera))


def _colours(images: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("ij,njhw->nihw", matrix.to(images), images)


CAMERA = Camera()
"""The camera that the shipped weights were trained for."""
