"""diffpure: diffuses the image a little and lets a diffusion model bring it back (Nie et al. 2022)."""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from robustbench_x.errors import ConfigError
from robustbench_x.plugin import DefenseSpec, param
from robustbench_x_defenses.preprocess.pixels import keep_broken

__all__ = ["SPEC", "DiffPure"]


@dataclass(frozen=True, kw_only=True)
class _Prior:
    """A diffusion model of images in [-1, 1], `size` pixels wide and high.

    `kept` `(T,)` is the share of the image's variance that is left after each step of the forward process, alpha-bar;
    `clip` bounds the model's estimate of the clean image, 0 for not at all.
    """

    network: Any
    size: tuple[int, int]
    kept: Tensor
    prediction: str
    clip: float

    def clean(self, noisy: Tensor, step: int) -> Tensor:
        """The estimate of the clean image behind `noisy` at `step`."""
        out: Tensor = self.network(noisy, step).sample
        signal, noise = self.kept[step].sqrt(), (1 - self.kept[step]).sqrt()
        if self.prediction == "epsilon":
            out = (noisy - noise * out) / signal
        elif self.prediction == "v_prediction":
            out = signal * noisy - noise * out
        return out.clamp(-self.clip, self.clip) if self.clip else out


@final
@dataclass(frozen=True, kw_only=True)
class DiffPure:
    """Adds the noise of the first `t` of a diffusion model's schedule, and runs the model backwards from there.

    Images are resized bilinearly to the size in the model's configuration and mapped to [-1, 1]; noised once, to step
    n = round(t * T); brought back in `steps` steps; and resized to H x W. With `steps` 0 (or n) these are the n
    ancestral steps of DDPM, with the smaller of its two fixed variances; with fewer they are DDIM steps without noise
    (eta 0), evenly spaced from n down to the clean image. Either way the estimate of the clean image is clipped as the
    scheduler's configuration says. Published: 100 of 1000 steps for CIFAR-10 at 8/255 (`t=0.1`), 150 of 1000 for
    ImageNet at 4/255 (the default).

    `weights` is a folder or a Hugging Face name, of a `UNet2DModel` and a scheduler's configuration side by side, or in
    the folders `unet` and `scheduler`; weights must be safetensors. The network must be unconditional and predict
    `epsilon`, `sample` or `v_prediction` for RGB.

    The gradient is exact, through every step. Each step's activations are recomputed on the way back, so that memory is
    that of one step plus one image a step; time is about three forward passes.

    Departures:
        Nie et al. solve the reverse SDE and take gradients by the adjoint method; their own DDPM runner has no gradient
        at all. Later work found attacks with gradients through the discrete steps to be the stronger ones
        (Lee and Kim 2023).
        Models that predict a variance too, like the one the paper uses on ImageNet, are refused.
        `steps` below n is not in the paper.
    """

    weights: str = param("", "folder or Hugging Face name of a diffusers UNet2DModel; must be given")
    t: float = param(0.15, "how far to diffuse, as a share of the schedule")
    steps: int = param(0, "reverse steps; 0: every one, ancestral; fewer: DDIM")

    def __post_init__(self) -> None:
        if not 0 < self.t <= 1:
            raise ValueError(f"t={self.t} must lie above 0 and be at most 1")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must be 0 or more")

    def apply(self, images: Tensor) -> Tensor:
        """Purified images.

        Raises:
            ConfigError: `weights` are missing, cannot be read or are of another kind, or `steps` are too many.
        """
        if not self.weights:
            raise ConfigError(
                "diffpure: weights is empty; give a diffusers UNet2DModel of images like yours, for example "
                "weights=google/ddpm-cifar10-32 or a local folder"
            )
        prior = _prior(self.weights, images.device)
        path = self.path(len(prior.kept))
        small = F.interpolate(images, prior.size, mode="bilinear", antialias=True, align_corners=False)
        noisy = _mixed(2 * small - 1, prior.kept[path[0]], torch.randn_like(small))
        ancestral = len(path) == path[0] + 1
        for step, following in zip(path, [*path[1:], -1], strict=True):
            noise = torch.randn_like(noisy) if ancestral and following >= 0 else None
            if torch.is_grad_enabled() and noisy.requires_grad:
                noisy = checkpoint(
                    _backwards, prior, noisy, step, following, noise, use_reentrant=False, preserve_rng_state=False
                )
            else:
                noisy = _backwards(prior, noisy, step, following, noise)
        back = F.interpolate(noisy / 2 + 0.5, images.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
        return keep_broken(back.clamp(0, 1), images)

    def path(self, total: int) -> list[int]:
        """The steps, counted from 0, at which the network is asked, for a schedule of `total`: from n - 1 down.

        Raises:
            ConfigError: `steps` are more than n.
        """
        noised = max(1, round(self.t * total))
        if self.steps > noised:
            raise ConfigError(f"diffpure: steps={self.steps} are more than the {noised} that t={self.t} adds")
        count = self.steps or noised
        return [round(noised * (count - i) / count) - 1 for i in range(count)]


def _backwards(prior: _Prior, noisy: Tensor, step: int, following: int, noise: Tensor | None) -> Tensor:
    """From `step` to the earlier step `following` (-1: the clean image): ancestral with `noise`, DDIM without."""
    clean = prior.clean(noisy, step)
    if following < 0:
        return clean
    kept, kept_then = prior.kept[step], prior.kept[following]
    direction = (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()
    if noise is None:
        return _mixed(clean, kept_then, direction)
    fresh = (1 - kept_then) / (1 - kept) * (1 - kept / kept_then)
    return kept_then.sqrt() * clean + (1 - kept_then - fresh).clamp(min=0).sqrt() * direction + fresh.sqrt() * noise


def _mixed(clean: Tensor, kept: Tensor, noise: Tensor) -> Tensor:
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise


@functools.lru_cache(maxsize=1)
def _prior(weights: str, device: torch.device) -> _Prior:
    from diffusers import DDPMScheduler, UNet2DModel

    network = _load(UNet2DModel, weights, "unet", use_safetensors=True)
    scheduler = _load(DDPMScheduler, weights, "scheduler")
    config, schedule = network.config, scheduler.config
    if (config.in_channels, config.out_channels) != (3, 3) or network.class_embedding is not None:
        raise ConfigError(f"diffpure: weights={weights} must be unconditional, with 3 channels in and 3 out")
    if not config.sample_size:
        raise ConfigError(f"diffpure: weights={weights} has no sample_size in its configuration")
    if schedule.get("thresholding"):
        raise ConfigError(f"diffpure: weights={weights} asks for dynamic thresholding, which is not supported")
    size = config.sample_size
    return _Prior(
        network=network.to(device).eval().requires_grad_(False),
        size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        kept=scheduler.alphas_cumprod.to(device),
        prediction=schedule.prediction_type,
        clip=schedule.clip_sample_range if schedule.clip_sample else 0.0,
    )


def _load(kind: Any, weights: str, folder: str, **options: Any) -> Any:
    """`kind` from `weights`: from the folder of that name where there is one, else from the top."""
    local = Path(weights).is_dir()
    folders: tuple[str | None, ...] = (folder, None)
    if local:
        folders = (folder,) if (Path(weights) / folder).is_dir() else (None,)
    for subfolder in folders:
        try:
            return kind.from_pretrained(weights, subfolder=subfolder, **options)
        except OSError as error:
            problem = error
    reason = str(problem).splitlines()[0]
    raise ConfigError(f"diffpure: weights={weights} cannot be loaded as a {kind.__name__}: {reason}") from problem


def _model_files(weights: str) -> tuple[Path, ...]:
    """The files of a local model, which decide what is purified; none for a name of the hub."""
    folder = Path(weights).expanduser()
    if not weights or not folder.is_dir():
        return ()
    return tuple(sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")))


SPEC = DefenseSpec(
    name="diffpure",
    summary="noised, then purified by a diffusion model (needs weights)",
    factory=DiffPure,
    source="Nie et al. 2022, Diffusion Models for Adversarial Purification (ICML), arXiv 2205.07460",
    stochastic=True,
    reads=lambda defense: _model_files(defense.weights),
    extra=("diffusers", "purification"),
    missing=lambda: importlib.util.find_spec("diffusers") is None,
)
