"""AdvEncoder's generator: one fixed noise, a DCGAN trunk, and a convolution that mixes its outputs into one pattern."""

import itertools
from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.errors import AttackError
from robustbench_x.threat import ThreatModel
from robustbench_x.views import FitView
from robustbench_x_attacks.universal.pattern import (
    Objective,
    check_moved,
    pattern_shape,
    put_on,
    step_places,
    stored,
)

__all__ = ["Generator", "GeneratorTrainer", "bounded"]

_LATENT = 100
_TRUNK = 32
"""Side of the trunk's output."""


@final
class Generator(nn.Module):
    """Fixed noise `(noises, 100, 1, 1)` to one pattern `(1, 3, *size)`, unbounded.

    Four blocks of transposed convolution, batch norm and ReLU reach 32 x 32; the last transposed convolution doubles
    that, and tanh follows. The images then swap their axes with the channels, so that a 3 x 3 convolution mixes all
    of them into one. At 64 x 64 this is the published network. For another size the trunk's output is resized
    (bilinear) to half of it first: the number of weights stays, and no pixel is left to a bias alone, as with the
    stride of 8 by which AdvCLIP reaches 224.

    Args:
        size: (height, width) of the pattern.
        noises: Images that are mixed; the published code has 256, its batch size.
        width: Channels of the first block; the published network has 1024.
        seed: Decides noise and weights: N(0, 0.02) for convolutions, zero for their biases.
    """

    noise: Tensor

    def __init__(self, *, size: tuple[int, int], noises: int, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.register_buffer("noise", torch.randn(noises, _LATENT, 1, 1, generator=generator))
        widths = [_LATENT, width, width // 2, width // 4, width // 8]
        blocks: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            stride, padding = (1, 0) if number == 0 else (2, 1)
            up = nn.ConvTranspose2d(before, after, 4, stride, padding, device="meta")
            blocks += [up, nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*blocks)
        self.last = nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1, device="meta")
        self.mix = nn.Conv2d(noises, 1, 3, padding=1, device="meta")
        # By way of meta: the weights come from this generator, never from the global one.
        for part in self.modules():
            if isinstance(part, (nn.ConvTranspose2d, nn.Conv2d)):
                part.to_empty(device="cpu")
                nn.init.normal_(part.weight, 0.0, 0.02, generator=generator)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self) -> Tensor:
        """The pattern."""
        features: Tensor = self.trunk(self.noise)
        half = ((self.size[0] + 1) // 2, (self.size[1] + 1) // 2)
        if half != (_TRUNK, _TRUNK):
            features = F.interpolate(features, half, mode="bilinear", align_corners=False)
        images = torch.tanh(self.last(features))[..., : self.size[0], : self.size[1]]
        mixed: Tensor = self.mix(images.transpose(0, 1))
        return mixed.transpose(0, 1)


def bounded(raw: Tensor, threat: ThreatModel, size: tuple[int, int]) -> Tensor:
    """A generator's output as a pattern for images of `size`: resized, cut to the patch, inside the budget.

    Hard bounds, as published: the gradient is zero where they hold. A patch is the middle of the output, moved
    from [-1, 1] to [0, 1] and clamped: a valid image, unlike the released patches, whose values are clamped to the
    range of normalised pixels.
    """
    if raw.shape[-2:] != size:
        raw = F.interpolate(raw, size, mode="bilinear", align_corners=False)
    if threat.norm != "patch":
        return raw.clamp(-threat.eps, threat.eps)
    side = pattern_shape(threat, size)[-1]
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return ((raw[..., top : top + side, left : left + side] + 1) / 2).clamp(0, 1)


@final
class GeneratorTrainer:
    """Adam on a generator's weights (betas 0.5, 0.999, as published); batch norm stays in train mode.

    Args:
        view: What the training is handed.
        objective: What falls.
        generator: At its start, on the CPU.
        steps: In all.
        batch: Surrogate images per step.
        rate: Adam's learning rate.
    """

    def __init__(
        self, view: FitView, objective: Objective, generator: Generator, *, steps: int, batch: int, rate: float
    ) -> None:
        self.steps = steps
        self.batch = batch
        self._view = view
        self._objective = objective
        self._generator = generator.to(view.device).train()
        self._optimizer = torch.optim.Adam(self._generator.parameters(), lr=rate, betas=(0.5, 0.999))
        self._pattern = self._render()
        self._moved = torch.tensor(False, device=view.device)

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`."""
        view, clean = self._view, self._view.surrogate.batch(index)
        with torch.enable_grad():
            pattern = bounded(self._generator(), view.threat, view.encoder.input_size)
            adversarial = put_on(clean, pattern, view.threat, places=step_places(view, number))
            loss = self._objective(adversarial, clean, index, number)
            self._optimizer.zero_grad(set_to_none=True)
            loss.total.backward()  # type: ignore[no-untyped-call]
            self._check_gradients(number)
            self._optimizer.step()
        # The released code keeps the pattern of the last iteration, from before its step.
        self._pattern = pattern.detach()
        return {name: term.detach() for name, term in loss.terms.items()}

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        state = {f"generator.{name}": tensor for name, tensor in self._generator.state_dict().items()}
        for number, parameter in enumerate(self._generator.parameters()):
            for name, value in self._optimizer.state[parameter].items():
                state[f"adam.{number}.{name}"] = torch.as_tensor(value)
        return {**state, "pattern": self._pattern, "moved": self._moved}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        own = {name: state[f"generator.{name}"] for name in self._generator.state_dict()}
        self._generator.load_state_dict(own)
        for number, parameter in enumerate(self._generator.parameters()):
            prefix = f"adam.{number}."
            held = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            # Adam keeps its step on the CPU.
            self._optimizer.state[parameter] = {
                name: value.clone() if name == "step" else value.to(self._view.device, copy=True)
                for name, value in held.items()
            }
        self._pattern = state["pattern"].to(self._view.device)
        self._moved = state["moved"].to(self._view.device, copy=True)

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`; AttackError when no step had a gradient."""
        check_moved(self._moved)
        return stored(self._pattern, self._view.threat)

    def _check_gradients(self, number: int) -> None:
        gradients = [p.grad for p in self._generator.parameters() if p.grad is not None]
        largest = torch.stack([gradient.abs().amax() for gradient in gradients]).amax()
        if not largest.isfinite():
            raise AttackError(f"the gradient of step {number} holds NaN or infinity, so nothing can be learned from it")
        self._moved |= largest > 0

    @torch.no_grad()
    def _render(self) -> Tensor:
        """The pattern at the start; a pass in train mode, so batch norm's running figures move as in a step."""
        return bounded(self._generator(), self._view.threat, self._view.encoder.input_size)
