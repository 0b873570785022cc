"""The victim: defence, encoder, head, as one function of pixels; and the defence as an attacker may know it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.encoders.encoder import Encoder, check_range
from robustbench_x.errors import SampleError
from robustbench_x.heads.base import FittedHead
from robustbench_x.plugin import Defense, DefenseSpec
from robustbench_x.views import Knowledge, Perceive

__all__ = ["DefendedEncoder", "Shield", "fresh_draw", "perceive"]


@dataclass(frozen=True, kw_only=True)
class Shield:
    """A built defence with its spec; `None` in its place means undefended."""

    spec: DefenseSpec
    defense: Defense

    def apply(self, images: Tensor) -> Tensor:
        """The deployed defence on a copy of `images`, with its output's shape checked.

        Raises:
            SampleError: It returned no tensor, or another number of images or of channels.
        """
        # A copy: a defence that writes to its input would otherwise change the clean images it is compared with.
        out = self.defense.apply(images.clone())
        if not isinstance(out, Tensor):
            raise SampleError(f"defence {self.spec.name} returned a {type(out).__name__}, not a tensor")
        if out.ndim != 4 or out.shape[:2] != images.shape[:2]:
            raise SampleError(
                f"defence {self.spec.name} turned images of shape {tuple(images.shape)} into {tuple(out.shape)}"
            )
        return out


@dataclass(frozen=True, kw_only=True)
class DefendedEncoder:
    """What is deployed in front of a head: an optional defence, then the encoder that the head reads."""

    encoder: Encoder
    shield: Shield | None = None

    @property
    def stochastic(self) -> bool:
        """Whether the defence draws anew at every call."""
        return self.shield is not None and self.shield.spec.stochastic

    def features(self, images: Tensor) -> Tensor:
        """Features `(N, D)` float32 of `images` in [0, 1], as deployed; a row whose defence gave NaN is NaN.

        Raises:
            RangeError: `images`, or what the defence made of them, leave [0, 1].
        """
        check_range(images)
        if self.shield is None:
            return self.encoder(images)  # type: ignore[no-any-return]
        seen = self.shield.apply(images)
        broken = ~seen.isfinite().flatten(1).all(dim=1)
        if not broken.any():
            return self.encoder(seen)  # type: ignore[no-any-return]
        features = torch.full((len(images), self.encoder.feature_dim), torch.nan, device=images.device)
        if not broken.all():
            features[~broken] = self.encoder(seen[~broken])
        return features

    def logits(self, images: Tensor, head: FittedHead) -> Tensor:
        """Logits `(N, K)` float32, as deployed; `head` must read this encoder, a tuned one its own."""
        assert head.encoder is None or head.encoder is self.encoder, f"head {head.name} reads an encoder of its own"
        return head(self.features(images))  # type: ignore[no-any-return]


def perceive(shield: Shield | None, knowledge: Knowledge) -> Perceive:
    """The defence as an attacker with `knowledge` runs it: pixels to pixels.

    `none` and `oblivious` see no defence. `bpda` runs the real one forward and passes gradients through as if
    it were the identity (Athalye et al. 2018). `full` has its true gradient, or, where the defence has
    none, the real forward value with the gradient of its differentiable stand-in.
    """
    if shield is None or knowledge in ("none", "oblivious"):
        return _identity
    if knowledge == "bpda":

        def bpda(images: Tensor) -> Tensor:
            value = shield.apply(images.detach())
            return _straight_through(value, images)

        return bpda
    if shield.spec.gradient == "exact":
        return shield.apply

    def full(images: Tensor) -> Tensor:
        soft: Tensor = shield.defense.stand_in(images.clone())  # type: ignore[attr-defined]  # checked at registration
        return _straight_through(shield.apply(images.detach()), soft)

    return full


def _straight_through(value: Tensor, soft: Tensor) -> Tensor:
    """Exactly `value`, with the gradient of `soft`, which is resized where the defence changes the size."""
    if soft.shape != value.shape:
        soft = F.interpolate(soft, value.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    # soft - soft is exactly zero (finite pixels), so the value is the deployed one to the last bit.
    return value.detach() + (soft - soft.detach())


@contextmanager
def fresh_draw(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators for one draw of a random defence and restores them after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _identity(images: Tensor) -> Tensor:
    return images
