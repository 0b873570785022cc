"""S: the conventional camera pipeline from packed RAW to RGB, on kornia's demosaicing."""

import torch.nn.functional as F
from kornia.color import CFA, raw_to_rgb
from torch import Tensor

from robustbench_x_defenses.raw_isp.bayer import ORDER, mosaic, pack, unpack
from robustbench_x_defenses.raw_isp.camera import BLACK, CAMERA, Camera

__all__ = ["develop_raw", "raw_from_rgb"]

_CFA = CFA.BG
"""kornia names colour filter arrays as OpenCV does, by the second row: BG has red at (0, 0), which is RGGB."""


def develop_raw(packed: Tensor, camera: Camera = CAMERA) -> Tensor:
    """RGB `(N, 3, H, W)` in [0, 1] of packed RAW `(N, 4, H, W)`.

    Black level, white balance, bilinear demosaicing of the 2H x 2W mosaic, colour matrix, gamma, tone curve, and a
    2 x 2 mean back to H x W. Differentiable; where it clips, the gradient is that of the clip.

    The gains are applied to the mosaic, before demosaicing, so that bilinear interpolation sees a balanced one.
    """
    gains = {"R": camera.red_gain, "B": camera.blue_gain}
    scale = packed.new_tensor([gains.get(name, 1.0) * camera.rgb_gain for name in ORDER]).view(1, -1, 1, 1)
    balanced = ((packed - BLACK) / (1 - BLACK) * scale).clamp(0, 1)
    return F.avg_pool2d(camera.develop(raw_to_rgb(unpack(balanced), _CFA)), 2)


def raw_from_rgb(rgb: Tensor, camera: Camera = CAMERA) -> Tensor:
    """Packed RAW `(N, 4, H, W)` that the camera would have recorded of sRGB `(N, 3, 2H, 2W)` in [0, 1], noise apart."""
    return BLACK + (1 - BLACK) * pack(mosaic(camera.unprocess(rgb)))
