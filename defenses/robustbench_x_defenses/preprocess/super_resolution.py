"""super_resolution: wavelet denoising, then super-resolution (Mustafa et al. 2019)."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import final

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import ConfigError
from robustbench_x.plugin import DefenseSpec, param
from robustbench_x_defenses.preprocess.edsr import Edsr
from robustbench_x_defenses.preprocess.pixels import keep_broken
from robustbench_x_defenses.preprocess.wavelet import denoise

__all__ = ["SPEC", "SuperResolution"]


@final
@dataclass(frozen=True, kw_only=True)
class SuperResolution:
    """Denoises with soft BayesShrink thresholds on Haar wavelets, doubles the size, and goes back to the old one.

    Denoising is that of the authors' script, scikit-image's (see `wavelet.denoise`), with `sigma` as the assumed
    standard deviation of the noise. The size is doubled by the EDSR baseline whose weights are given, a `.safetensors`
    file of the published state dict (safetensors runs no code on loading), or without weights by bicubic
    interpolation. The gradient is exact.

    Departures:
        The paper hands the enlarged image to the classifier. An encoder here takes its own input size only, so the
        image is brought back to H x W by averaging 2 x 2 pixels.
        Bicubic enlarging followed by averaging is little more than a mild blur: without weights this measures the
        denoiser. It is the default because the weights come with no package.
        Only the small baseline network is offered, not the large EDSR.
        The script saves the denoised image as JPEG in between; not done here.
    """

    sigma: float = param(0.01, "assumed noise, for pixels in [0, 1]; 0 leaves the denoiser out; published: 0 to 0.04")
    weights: str = param("", "x2 EDSR-baseline weights, a .safetensors file; empty: bicubic")

    def __post_init__(self) -> None:
        if not 0 <= self.sigma <= 1:
            raise ValueError(f"sigma={self.sigma} must lie between 0 and 1")
        if self.weights and Path(self.weights).suffix != ".safetensors":
            raise ValueError(f"weights={self.weights} must be a .safetensors file; convert other formats first")

    def apply(self, images: Tensor) -> Tensor:
        """Denoised, enlarged and reduced images.

        Raises:
            ConfigError: `weights` cannot be read, or are not those of this network.
        """
        calm = (denoise(images, self.sigma) if self.sigma else images).clamp(0, 1)
        if self.weights:
            large = _network(Path(self.weights), images.device)(calm)
        else:
            large = F.interpolate(calm, scale_factor=2, mode="bicubic", align_corners=False)
        return keep_broken(F.avg_pool2d(large.clamp(0, 1), 2), images)


@functools.lru_cache(maxsize=1)
def _network(path: Path, device: torch.device) -> Edsr:
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"super_resolution: weights={path} cannot be read: {error}") from error
    network = Edsr()
    state = {name: t for name, t in state.items() if not name.startswith(("sub_mean.", "add_mean."))}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ConfigError(f"super_resolution: weights={path} do not fit the EDSR x2 baseline: {first}") from error
    return network.to(device).eval().requires_grad_(False)


SPEC = DefenseSpec(
    name="super_resolution",
    summary="wavelet denoising, then x2 super-resolution (EDSR, or bicubic without weights) and back",
    factory=SuperResolution,
    source="Mustafa et al. 2019, Image Super-Resolution as a Defense (IEEE TIP 2020), arXiv 1901.01677",
    reads=lambda defense: (Path(defense.weights).expanduser(),) if defense.weights else (),
)
