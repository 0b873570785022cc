"""BPDA through a learned surrogate of the defence: a small network that imitates it, for its gradient alone."""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.errors import SampleError
from robustbench_x.fitting.artifact import Artifact
from robustbench_x.fitting.ground import Ground, code_digest
from robustbench_x.fitting.loop import Show
from robustbench_x.integrity import modules_within
from robustbench_x.plugin import Spec, param
from robustbench_x.randomness import derive_seed
from robustbench_x.victim import Shield
from robustbench_x.views import Images, Meter, Perceive

__all__ = ["ImitationJob", "Imitator", "arm_imitation"]

_NOISE = 8 / 255
_PREFIX = "imitator."
_WINDOW = 96


@final
class Imitator(nn.Module):
    """Images `(N, 3, H, W)` to images: the identity and a correction by three 3 x 3 convolutions, 24 channels wide.

    The correction starts at zero, so that an untrained imitator is plain BPDA.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 24, 3)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, padding_mode="replicate") for a, b in itertools.pairwise(widths)
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """What the defence is thought to make of them."""
        x = images
        for number, layer in enumerate(self.layers):
            x = layer(x if number == 0 else F.silu(x))
        return images + x


@dataclass(frozen=True, kw_only=True)
class ImitationRecipe:
    """How long an imitation is trained."""

    steps: int = param(150, "optimisation steps")
    batch: int = param(4, "images per step")
    rate: float = param(2e-3, "Adam's rate, which falls linearly to zero")


@final
class _Trainer:
    """Adam on the mean squared distance to what the defence makes of clean and of noisy images."""

    def __init__(self, shield: Shield, images: Images, device: torch.device, recipe: ImitationRecipe) -> None:
        self.steps, self.batch = recipe.steps, min(recipe.batch, len(images))
        self._shield = shield
        self._images = images
        self._recipe = recipe
        self._net = Imitator().to(device)
        self._optimizer = torch.optim.Adam(self._net.parameters(), lr=recipe.rate)

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`."""
        clean = self._images.batch(index)
        size = _NOISE * torch.rand(len(clean), 1, 1, 1, device=clean.device)
        images = (clean + size * torch.randn_like(clean).sign()).clamp(0, 1)
        with torch.no_grad():
            wanted = self._shield.apply(images)
        if wanted.ndim == 5:  # several looks: the gradient goes to every look alike
            wanted = wanted.mean(dim=1)
        if wanted.shape[-2:] != images.shape[-2:]:
            wanted = F.interpolate(wanted, images.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
        # A window of each is enough for a map this local, and the network is what takes the time.
        images, wanted = _window(images, wanted)
        with torch.enable_grad():
            loss = F.mse_loss(self._net(images), wanted)
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.rate * (1 - number / self.steps)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        with torch.no_grad():
            return {"imitation": loss.detach(), "identity": F.mse_loss(images, wanted)}

    def state(self) -> dict[str, Tensor]:
        """No checkpoint is kept: it takes seconds."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `state`."""

    def result(self) -> dict[str, Tensor]:
        """The weights."""
        return {f"{_PREFIX}{name}": t.detach().clone() for name, t in self._net.state_dict().items()}


def _window(images: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The same random square of both."""
    side = min(_WINDOW, *images.shape[-2:])
    top, left = (int(torch.randint(size - side + 1, (1,))) for size in images.shape[-2:])
    window = (..., slice(top, top + side), slice(left, left + side))
    return images[window], wanted[window]


_SPEC = Spec(name="imitation", summary="imitates a defence", factory=ImitationRecipe, source="Athalye et al. 2018")


@final
@dataclass(frozen=True, kw_only=True)
class ImitationJob:
    """The training of an imitation of `shield`, on the surrogate images at the size of the encoder of `ground`."""

    ground: Ground
    shield: Shield
    shield_params: Mapping[str, Any]
    recipe: ImitationRecipe = field(default_factory=ImitationRecipe)

    @property
    def name(self) -> str:
        """What progress calls it."""
        return f"imitation of {self.shield.spec.name}"

    @property
    def untouchable(self) -> tuple[nn.Module, ...]:
        """The defence's own networks."""
        return tuple(modules_within(self.shield.defense))

    def cache_key(self) -> str:
        """Defence, parameters, what it learned, code, images and seed; the encoder decides nothing but the size."""
        ground, shield = self.ground, self.shield
        parts = [
            code_digest("robustbench_x"),
            shield.spec.name,
            code_digest(shield.spec.factory.__module__),
            repr(sorted(self.shield_params.items())),
            shield.learned,
            ground.pool.sha256,
            str(ground.seed),
            repr(self.recipe),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def run(self, checkpoint: Path | None, show: Show | None = None, *, every: float = 20.0) -> Artifact:
        """Trains; from the start, whatever `checkpoint` holds.

        Raises:
            SampleError: The training broke down.
        """
        ground = self.ground
        trained = ground.train(
            lambda: _Trainer(self.shield, ground.surrogate(), ground.device, self.recipe),
            f"{self.name}:{derive_seed(repr(sorted(self.shield_params.items())))}",
            Meter(),
            key="",
            checkpoint=None,
            show=show,
            every=every,
        )
        params = {"steps": self.recipe.steps, "batch": self.recipe.batch, "rate": self.recipe.rate}
        return Artifact(trained.tensors, ground.provenance(_SPEC, params, self.cache_key(), trained))


def arm_imitation(learned: Mapping[str, Tensor], device: torch.device) -> Perceive:
    """The imitation as a function of pixels."""
    net = Imitator()
    try:
        net.load_state_dict({name.removeprefix(_PREFIX): t for name, t in learned.items()}, strict=True)
    except RuntimeError as error:
        raise SampleError(f"these are no weights of an imitation: {error}") from error
    return net.eval().requires_grad_(False).to(device)
