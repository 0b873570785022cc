"""jpeg: compresses the image before the encoder sees it (Dziugaite et al. 2016)."""

import io
from dataclasses import dataclass
from typing import final

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.plugin import DefenseSpec, param

__all__ = ["JPEG", "SPEC"]


@final
@dataclass(frozen=True, kw_only=True)
class JPEG:
    """A round trip through libjpeg at a fixed quality, 4:2:0 chroma.

    The forward pass is the real codec (Pillow's libjpeg), on the 8-bit rounding of the pixels, so it has no
    gradient. The stand-in is kornia's differentiable codec (Reich et al. 2024), which replaces the rounding
    by a polynomial; sides that are no multiple of 16 are padded by replication for it and cropped again.
    """

    quality: int = param(75, "libjpeg quality, 1 to 95")

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality={self.quality} must lie between 1 and 95")

    def apply(self, images: Tensor) -> Tensor:
        """Decoded images; NaN pixels stay NaN, since a codec would turn them into a colour."""
        levels = (images.detach().clamp(0, 1) * 255).round().nan_to_num(0).to(torch.uint8).cpu()
        decoded = torch.stack([self._round_trip(image) for image in levels]).to(images.device, images.dtype)
        broken = ~images.detach().isfinite().all(dim=(1), keepdim=True)
        return decoded.masked_fill(broken, torch.nan)

    def stand_in(self, images: Tensor) -> Tensor:
        """kornia's codec at the same quality."""
        from kornia.enhance import jpeg_codec_differentiable

        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
        quality = torch.full((len(images),), float(self.quality), device=images.device)
        decoded: Tensor = jpeg_codec_differentiable(padded, quality)
        return decoded[..., :height, :width].clamp(0, 1)

    def _round_trip(self, levels: Tensor) -> Tensor:
        buffer = io.BytesIO()
        height, width = levels.shape[-2:]
        PIL.Image.frombytes("RGB", (width, height), levels.permute(1, 2, 0).contiguous().numpy().tobytes()).save(
            buffer, format="JPEG", quality=self.quality, subsampling="4:2:0"
        )
        with PIL.Image.open(buffer) as image:
            flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return flat.view(height, width, 3).permute(2, 0, 1).float() / 255


SPEC = DefenseSpec(
    name="jpeg",
    summary="JPEG round trip through libjpeg; full knowledge uses kornia's differentiable codec",
    factory=JPEG,
    source="Dziugaite et al. 2016, arXiv 1608.00853; stand-in: Reich et al. 2024, arXiv 2309.06978",
    gradient="stand-in",
)
