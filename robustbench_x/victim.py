"""The victim: defence, encoder, head, as one function of pixels; and the defence as an attacker may know it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.encoders.encoder import Encoder, check_range, features_of_looks
from robustbench_x.errors import SampleError
from robustbench_x.heads.base import FittedHead
from robustbench_x.plugin import Defense, DefenseSpec
from robustbench_x.views import EncoderHandle, Knowledge, Meter, Perceive

__all__ = ["DefendedEncoder", "Shield", "Threshold", "fresh_draw", "perceive"]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where a detector refuses: `refuse_above` a score; `spread` is the clean scores' standard deviation."""

    refuse_above: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Shield:
    """A built defence with its spec; `None` in its place means undefended.

    Args:
        spec: What the registry knows of it.
        defense: What is deployed.
        learned: Digest of what it was trained to; empty for a defence that learns nothing.
        threshold: Where it refuses, for a detector.
        imitation: A network that was trained to do what `apply` does, for attackers at `bpda_learned`.
        failure: Why its training left nothing to deploy; every image behind it is then an error.
        unimitated: Why there is no imitation of it.
    """

    spec: DefenseSpec
    defense: Defense
    learned: str = ""
    threshold: Threshold | None = None
    imitation: Perceive | None = None
    failure: str = ""
    unimitated: str = ""

    def barred(self, knowledge: Knowledge) -> str:
        """Why no attacker with `knowledge` can run through it; empty where one can."""
        if knowledge in ("none", "oblivious"):
            return ""
        return self.failure or (self.unimitated if knowledge == "bpda_learned" else "")

    def apply(self, images: Tensor) -> Tensor:
        """The deployed defence on a copy of `images`, with its output's shape checked.

        Raises:
            SampleError: It returned no tensor, or another number of images or of channels; or its training had failed.
        """
        if self.failure:
            raise SampleError(self.failure)
        # A copy: a defence that writes to its input would otherwise change the clean images it is compared with.
        out = self.defense.apply(images.clone())
        if not isinstance(out, Tensor):
            raise SampleError(f"defence {self.spec.name} returned a {type(out).__name__}, not a tensor")
        if out.ndim not in (4, 5) or (out.shape[0], out.shape[-3]) != tuple(images.shape[:2]) or not out.shape[1]:
            raise SampleError(
                f"defence {self.spec.name} turned images of shape {tuple(images.shape)} into {tuple(out.shape)}"
            )
        return out

    def score(self, images: Tensor, encoder: Encoder) -> Tensor:
        """A detector's scores `(N,)` on a copy of `images`, with gradients.

        Raises:
            SampleError: It returned something else.
        """
        handle = EncoderHandle(encoder, lambda pixels: pixels, Meter())
        scores: object = self.defense.score(images.clone(), handle)  # type: ignore[attr-defined]  # it detects
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise SampleError(f"detector {self.spec.name} scored {len(images)} images as {shape}")
        return scores


@dataclass(frozen=True, kw_only=True)
class DefendedEncoder:
    """What is deployed in front of a head: an optional defence, then the encoder that the head reads.

    `watcher` is the encoder that a detector was fitted for and reads, where the head reads a tuned copy of it.
    """

    encoder: Encoder
    shield: Shield | None = None
    watcher: Encoder | None = None

    @property
    def stochastic(self) -> bool:
        """Whether the defence draws anew at every call."""
        return self.shield is not None and self.shield.spec.stochastic

    @property
    def detects(self) -> bool:
        """Whether the defence may refuse an image."""
        return self.shield is not None and self.shield.threshold is not None

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
            return features_of_looks(self.encoder, seen)
        features = torch.full((len(images), self.encoder.feature_dim), torch.nan, device=images.device)
        if not broken.all():
            features[~broken] = features_of_looks(self.encoder, seen[~broken])
        return features

    def acceptance(self, images: Tensor) -> Tensor:
        """How clearly the detector accepts each image, `(N,)` with gradients, in spreads; refused below 0."""
        assert self.shield is not None, "no detector"
        assert self.shield.threshold is not None, "no detector"
        threshold = self.shield.threshold
        scores = self.shield.score(images, self.watcher or self.encoder)
        return (threshold.refuse_above - scores) / threshold.spread

    def logits(self, images: Tensor, head: FittedHead) -> Tensor:
        """Logits `(N, K)` float32, as deployed; `head` must read this encoder, a tuned one its own."""
        assert head.encoder is None or head.encoder is self.encoder, f"head {head.name} reads an encoder of its own"
        return head(self.features(images))  # type: ignore[no-any-return]


def perceive(shield: Shield | None, knowledge: Knowledge) -> Perceive:
    """The defence as an attacker with `knowledge` runs it: pixels to pixels.

    `none` and `oblivious` see no defence. `bpda` runs the real one forward and passes gradients through as if
    it were the identity (Athalye et al. 2018); `bpda_learned` passes them through a network that was trained to imitate
    it. `full` has its true gradient, or, where the defence has none, the real forward value with the gradient of its
    differentiable stand-in.

    Raises:
        SampleError: A training that this needs had failed.
    """
    if shield is None or knowledge in ("none", "oblivious"):
        return _identity
    if problem := shield.barred(knowledge):
        raise SampleError(problem)
    if knowledge in ("bpda", "bpda_learned"):
        imitation = _identity if knowledge == "bpda" else shield.imitation
        assert imitation is not None, f"nobody trained an imitation of {shield.spec.name}"

        def bpda(images: Tensor) -> Tensor:
            value = shield.apply(images.detach())
            return _straight_through(value, imitation(images))

        return bpda
    if shield.spec.gradient == "exact":
        return shield.apply

    def full(images: Tensor) -> Tensor:
        soft: Tensor = shield.defense.stand_in(images.clone())  # type: ignore[attr-defined]  # checked at registration
        return _straight_through(shield.apply(images.detach()), soft)

    return full


def _straight_through(value: Tensor, soft: Tensor) -> Tensor:
    """Exactly `value`, with the gradient of `soft`, which is resized where the defence changes the size."""
    if soft.shape[-2:] != value.shape[-2:]:
        soft = F.interpolate(soft, value.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    if soft.ndim < value.ndim:
        soft = soft[:, None]
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
