"""One pattern for every image: how it is put on, how it is read from an artefact, how it is improved by sign steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.randomness import derive_seed
from robustbench_x.threat import ThreatModel, patch_mask
from robustbench_x.views import EncoderView, FitView

__all__ = [
    "Ascent",
    "BestOf",
    "Improve",
    "Loss",
    "Objective",
    "SignTrainer",
    "apply_artifact",
    "check_moved",
    "clean_features",
    "clean_tokens",
    "gradient_of",
    "pattern_shape",
    "put_on",
    "step_places",
    "stored",
    "tokens_of",
]

_DECAY = 0.9
_CHUNK = 32
_MOST_BYTES = 2**30


class Loss(NamedTuple):
    """What is minimised, with the terms it is made of (0-d each)."""

    total: Tensor
    terms: Mapping[str, Tensor]


class Objective(Protocol):
    """The loss of adversarial images, with gradient."""

    def __call__(self, adversarial: Tensor, clean: Tensor, index: Tensor, number: int) -> Loss:
        """Loss of `adversarial` `(N, 3, H, W)`, made of the surrogate images `index`, at step `number`."""


class Ascent(NamedTuple):
    """A direction that improves the pattern, of the pattern's shape, with the loss terms."""

    direction: Tensor
    terms: Mapping[str, Tensor]


Improve = Callable[[Tensor, int, Tensor], Ascent]
"""Pattern, step number and surrogate images to a direction."""


def pattern_shape(threat: ThreatModel, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Shape of the universal pattern: the whole image, or the patch square."""
    if threat.norm != "patch":
        return (1, 3, *size)
    side = threat.side(*size)
    return (1, 3, side, side)


def put_on(images: Tensor, pattern: Tensor, threat: ThreatModel, *, places: torch.Generator | None = None) -> Tensor:
    """`images` with the pattern on, valid and inside the budget, differentiable in the pattern.

    Args:
        images: `(N, 3, H, W)` in [0, 1].
        pattern: A change within eps (`linf`), or the pixels of a patch in [0, 1].
        threat: The budget.
        places: Draws a place for the patch of each image; None takes the budget's own.
    """
    if threat.norm != "patch":
        return (images + pattern).clamp(0, 1)
    side, (height, width) = pattern.shape[-1], images.shape[-2:]
    if places is None:
        corners = threat.corners(images)
    else:
        free = torch.tensor([height - side + 1, width - side + 1])
        corners = (torch.rand(len(images), 2, generator=places) * free).long().to(images.device)
    mask = patch_mask(corners, side, height, width).expand_as(images)
    # masked_scatter fills in row-major order, which is the patch's own: image by image, channel by channel.
    return images.masked_scatter(mask, pattern.to(images.dtype).expand(len(images), -1, -1, -1).contiguous())


def stored(pattern: Tensor, threat: ThreatModel) -> dict[str, Tensor]:
    """The artefact of a pattern: `delta` with the `eps` it was fitted for, or `patch`."""
    if threat.norm == "patch":
        return {"patch": pattern.detach().clone()}
    return {"delta": pattern.detach().clone(), "eps": torch.tensor(threat.eps, dtype=torch.float64)}


def apply_artifact(view: EncoderView) -> Tensor:
    """The view's images with the learned pattern on.

    A pattern of another size is resized (bilinear: no value leaves the range of its neighbours). One fitted for
    another linf budget is scaled to this one.

    Raises:
        AttackError: There is no artefact, or it holds no pattern for this norm.
    """
    if view.threat.radius == 0:
        return view.inputs.clone()
    kind = "patch" if view.threat.norm == "patch" else "delta"
    if view.artifact is None or kind not in view.artifact:
        held = "none" if view.artifact is None else ", ".join(view.artifact)
        raise AttackError(
            f"a universal attack with norm {view.threat.norm} needs an artefact with a {kind}; got {held}"
        )
    pattern = view.artifact[kind].float()
    shape = pattern_shape(view.threat, (view.inputs.shape[-2], view.inputs.shape[-1]))
    if pattern.shape != shape:
        pattern = F.interpolate(pattern, shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    if kind == "delta":
        pattern = (pattern * (view.threat.eps / float(view.artifact["eps"]))).clamp(-view.threat.eps, view.threat.eps)
    return put_on(view.inputs, pattern.clamp(0, 1) if kind == "patch" else pattern, view.threat)


@torch.no_grad()
def clean_features(view: FitView) -> Tensor:
    """Features of every surrogate image, `(M, D)`: computed once, in an order that no resume changes."""
    chunks = torch.split(torch.arange(len(view.surrogate)), _CHUNK)
    return torch.cat([view.encoder.features(view.surrogate.batch(chunk)) for chunk in chunks])


@torch.no_grad()
def tokens_of(view: FitView, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Spatial tokens of `images` at each layer, without gradient."""
    tokens = view.encoder.tokens(images, layers)
    return [tokens[name].spatial for name in layers]


def clean_tokens(view: FitView, layers: Sequence[str]) -> list[Tensor] | None:
    """Tokens of every surrogate image at each layer, `(M, T, D)` on the CPU; None where they exceed 1 GiB.

    Computed once, in an order that no resume changes.
    """
    chunks = torch.split(torch.arange(len(view.surrogate)), _CHUNK)
    first = [tokens.cpu() for tokens in tokens_of(view, view.surrogate.batch(chunks[0]), layers)]
    size = sum(tokens[0].nbytes for tokens in first) * len(view.surrogate)
    if size > _MOST_BYTES:
        return None
    rest = [[t.cpu() for t in tokens_of(view, view.surrogate.batch(chunk), layers)] for chunk in chunks[1:]]
    return [torch.cat(parts) for parts in zip(first, *rest, strict=True)]


def gradient_of(view: FitView, objective: Objective) -> Improve:
    """The direction in which `objective` falls steepest."""

    def improve(pattern: Tensor, number: int, index: Tensor) -> Ascent:
        clean = view.surrogate.batch(index)
        with torch.enable_grad():
            variable = pattern.detach().requires_grad_(True)
            adversarial = put_on(clean, variable, view.threat, places=step_places(view, number))
            loss = objective(adversarial, clean, index, number)
            (gradient,) = torch.autograd.grad(loss.total, variable)
        return Ascent(-gradient, {name: term.detach() for name, term in loss.terms.items()})

    return improve


def check_moved(moved: Tensor) -> None:
    """Refuses a training in which no gradient was ever other than zero.

    Raises:
        AttackError: Nothing was learned.
    """
    if not moved:
        raise AttackError("every gradient of the training was exactly zero, so nothing was learned")


def step_places(view: FitView, number: int) -> torch.Generator | None:
    """Where a randomly placed patch sits in the images of one step; None where the place is fixed."""
    if view.threat.norm != "patch" or view.threat.placement != "random":
        return None
    return torch.Generator().manual_seed(derive_seed(view.seed, "places", number))


@final
class SignTrainer:
    """Sign steps with momentum 0.9 and a step size that falls to zero along a cosine, inside the budget.

    Args:
        view: What the training is handed.
        improve: The direction.
        steps: In all.
        batch: Surrogate images per step.
        rate: First step size, as a share of eps, or of the pixel range inside a patch.
    """

    def __init__(self, view: FitView, improve: Improve, *, steps: int, batch: int, rate: float) -> None:
        self.steps = steps
        self.batch = batch
        self._view = view
        self._improve = improve
        self._size = rate * view.threat.radius
        generator = torch.Generator().manual_seed(derive_seed(view.seed, "start"))
        start = torch.rand(pattern_shape(view.threat, view.encoder.input_size), generator=generator)
        start = start if view.threat.norm == "patch" else view.threat.eps * (2 * start - 1)
        self._pattern = start.to(view.device)
        self._momentum = torch.zeros_like(self._pattern)
        self._moved = torch.tensor(False, device=view.device)

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`."""
        ascent = self._improve(self._pattern, number, index)
        if not ascent.direction.isfinite().all():
            raise AttackError(f"the gradient of step {number} holds NaN or infinity, so nothing can be learned from it")
        # By its own size, and zero where it vanishes: dividing would turn it into NaN.
        mean = ascent.direction.abs().mean()
        self._moved |= mean > 0
        unit = torch.where(mean > 0, ascent.direction / mean, torch.zeros_like(ascent.direction))
        self._momentum = _DECAY * self._momentum + unit
        size = self._size * 0.5 * (1 + math.cos(math.pi * number / self.steps))
        eps = self._view.threat.eps
        low, high = (0.0, 1.0) if self._view.threat.norm == "patch" else (-eps, eps)
        self._pattern = (self._pattern + size * self._momentum.sign()).clamp(low, high)
        return ascent.terms

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return {"pattern": self._pattern, "momentum": self._momentum, "moved": self._moved}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        self._pattern = state["pattern"].to(self._view.device)
        self._momentum = state["momentum"].to(self._view.device)
        self._moved = state["moved"].to(self._view.device, copy=True)

    def result(self) -> dict[str, Tensor]:
        """See `Trainer`; AttackError when no step had a gradient: the start must not pass for something learned."""
        check_moved(self._moved)
        return stored(self._pattern, self._view.threat)

    @property
    def pattern(self) -> Tensor:
        """The pattern as it stands."""
        return self._pattern


@final
class BestOf:
    """Several trainings one after another; the pattern that does most to the surrogate images' features is kept.

    The measure is the mean cosine similarity of clean and adversarial pooled features: all that an attacker with
    the encoder can see of the damage.

    Args:
        view: What the trainings were handed.
        trainers: By name, of equal batch size.
    """

    def __init__(self, view: FitView, trainers: Mapping[str, SignTrainer]) -> None:
        self._view = view
        self._trainers = dict(trainers)
        self._each = next(iter(trainers.values())).steps
        self.steps = self._each * len(trainers)
        self.batch = next(iter(trainers.values())).batch

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """See `Trainer`; the terms carry the name of the training at work."""
        name = list(self._trainers)[number // self._each]
        terms = self._trainers[name].step(number % self._each, index)
        return {f"{name} {term}": value for term, value in terms.items()}

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return {f"{name}.{key}": value for name, t in self._trainers.items() for key, value in t.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        for name, trainer in self._trainers.items():
            prefix = f"{name}."
            trainer.restore({key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)})

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """See `Trainer`; `similarity` holds the measure of every training, in order: the lowest was kept."""
        learned = {name: trainer.result() for name, trainer in self._trainers.items()}
        clean = clean_features(self._view)
        similarity = {name: self._similarity(trainer.pattern, clean) for name, trainer in self._trainers.items()}
        kept = learned[min(similarity, key=lambda name: similarity[name])]
        return {**kept, "similarity": torch.tensor(list(similarity.values()), dtype=torch.float64)}

    def _similarity(self, pattern: Tensor, clean: Tensor) -> float:
        view, total = self._view, 0.0
        for chunk in torch.split(torch.arange(len(view.surrogate)), _CHUNK):
            worn = put_on(view.surrogate.batch(chunk), pattern, view.threat, places=step_places(view, -1))
            kept = clean[chunk.to(clean.device)]
            total += float(F.cosine_similarity(view.encoder.features(worn), kept, dim=1).sum())
        return total / len(view.surrogate)
