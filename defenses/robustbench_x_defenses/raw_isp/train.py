"""The training of F and then of G on pairs of RAW and RGB."""

import math
from collections.abc import Iterator, Mapping
from typing import Protocol, final

import kornia
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.fitting.adam import optimizer_state, restore_optimizer
from robustbench_x.randomness import derive_seed
from robustbench_x.views import DefenseFitView
from robustbench_x_defenses.raw_isp.camera import BLACK
from robustbench_x_defenses.raw_isp.conventional import develop_raw, raw_from_rgb
from robustbench_x_defenses.raw_isp.networks import RawMapper
from robustbench_x_defenses.raw_isp.pairs import Pairs, RawPair

__all__ = ["RawISPTrainer", "Recipe", "psnr"]

_SHOWN = 16
_SHOW_EVERY = 50


class Recipe(Protocol):
    """What the trainer reads of the defence's parameters."""

    @property
    def omega(self) -> float: ...
    @property
    def patch(self) -> int: ...
    @property
    def f_steps(self) -> int: ...
    @property
    def g_steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def through_f(self) -> float: ...
    @property
    def pairs(self) -> str: ...


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0, 1], mean over the batch, 0-d."""
    error = (images - truth).square().flatten(1).mean(dim=1).clamp(min=1e-10)
    return (-10 * error.log10()).mean()


@final
class RawISPTrainer:
    """F for `f_steps` steps, then G for `g_steps`, each by Adam; F stands still while G learns.

    Args:
        view: The clean images.
        recipe: The parameters.
        g: The network G at its start.
    """

    def __init__(self, view: DefenseFitView, recipe: Recipe, g: nn.Module) -> None:
        self.steps = recipe.f_steps + recipe.g_steps
        self.batch = 0 if recipe.pairs else min(recipe.batch, len(view.images))
        self._view = view
        self._recipe = recipe
        self._pairs = Pairs(recipe.pairs, side=recipe.patch // 2) if recipe.pairs else None
        self._nets = nn.ModuleDict({"f": RawMapper(), "g": g}).to(view.device)
        self._optimizers = {name: torch.optim.Adam(net.parameters(), lr=recipe.rate) for name, net in self._named()}
        self._figures: dict[str, Tensor] = {}

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`; beside the loss, PSNR and SSIM of the whole defence on held-out images."""
        recipe = self._recipe
        first = number < recipe.f_steps
        name, place, total = ("f", number, recipe.f_steps) if first else ("g", number - recipe.f_steps, recipe.g_steps)
        pair = self._pair(number, index)
        with torch.enable_grad():
            loss = self._f_loss(pair) if first else self._g_loss(pair)
        optimizer = self._optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * 0.5 * (1 + math.cos(math.pi * place / total))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not self._figures or number % _SHOW_EVERY == 0 or number + 1 in (recipe.f_steps, self.steps):
            self._figures = self._held_out(learned=not first)
        return {f"{name}_loss": loss.detach(), **self._figures}

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`: weights and moments."""
        held = dict(self._nets.state_dict())
        for name, net in self._named():
            held |= optimizer_state(self._optimizers[name], list(net.parameters()), f"adam.{name}.")
        return held

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        self._nets.load_state_dict({k: t for k, t in state.items() if not k.startswith("adam.")}, strict=True)
        for name, net in self._named():
            restore_optimizer(self._optimizers[name], list(net.parameters()), f"adam.{name}.", state)

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`: the weights of `f.` and `g.`."""
        return {name: tensor.detach().clone() for name, tensor in self._nets.state_dict().items()}

    def _named(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(self._nets.items())

    def _pair(self, number: int, index: Tensor) -> RawPair:
        if self._pairs is None:
            return _unprocessed(self._view.images.batch(index))
        generator = torch.Generator().manual_seed(derive_seed(self._view.seed, "pairs", number))
        pair = self._pairs.batch(self._recipe.batch, generator)
        return RawPair(pair.raw.to(self._view.device), pair.rgb.to(self._view.device))

    def _f_loss(self, pair: RawPair) -> Tensor:
        """The published loss: the mean squared error of the clean and of a noisy image, 1:1."""
        f = self._nets["f"]
        return F.mse_loss(f(pair.rgb), pair.raw) + F.mse_loss(f(_noisy(pair.rgb)), pair.raw)

    def _g_loss(self, pair: RawPair) -> Tensor:
        """The mean absolute error from RAW with the sensor's noise and, for a share of the batch, from F's RAW."""
        raw = pair.raw if self._pairs is not None else _sensor_noise(pair.raw)
        share = round(self._recipe.through_f * len(raw))
        if share:
            with torch.no_grad():
                raw = torch.cat([self._nets["f"](_noisy(pair.rgb[:share])), raw[share:]])
        return F.l1_loss(self._nets["g"](raw), pair.rgb)

    @torch.no_grad()
    def _held_out(self, *, learned: bool) -> dict[str, Tensor]:
        """PSNR and SSIM of what comes back of held-out images: from S alone until there is a G."""
        pool = self._view.held_out
        images = F.avg_pool2d(pool.batch(torch.arange(min(_SHOWN, len(pool)))), 2)
        raw = self._nets["f"](images)
        back = develop_raw(raw)
        if learned:
            back = self._recipe.omega * self._nets["g"](raw) + (1 - self._recipe.omega) * back
        return {"psnr": psnr(back, images), "ssim": kornia.metrics.ssim(back, images, window_size=11).mean()}


def _unprocessed(patches: Tensor) -> RawPair:
    """A pair made of photographs `(N, 3, 2H, 2W)`: RAW of the whole, RGB of its half, as in the released geometry."""
    return RawPair(raw_from_rgb(patches), F.avg_pool2d(patches, 2))


def _noisy(images: Tensor) -> Tensor:
    """The published noise: s z with z ~ N(0, 0.1) a pixel and s ~ N(0, 1) an image; not clamped."""
    scale = torch.randn(len(images), 1, 1, 1, device=images.device)
    return images + scale * 0.1 * torch.randn_like(images)


def _sensor_noise(raw: Tensor) -> Tensor:
    """Shot and read noise of Brooks et al. (2019), of a level of its own for each image; black level apart."""
    low, high = math.log(1e-4), math.log(0.012)
    shot = low + (high - low) * torch.rand(len(raw), 1, 1, 1, device=raw.device)
    read = 2.18 * shot + 1.2 + 0.26 * torch.randn_like(shot)
    signal = ((raw - BLACK) / (1 - BLACK)).clamp(min=0)
    noise = (signal * shot.exp() + read.exp()).sqrt() * torch.randn_like(raw)
    return (raw + (1 - BLACK) * noise).clamp(min=0)
