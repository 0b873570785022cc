"""The encoder: images in [0, 1] to pooled features and per-layer tokens, with its own preprocessing.

An `Encoder` never holds the classifier it was published with: that is a `Classifier` of its own, so that
whoever is handed the encoder cannot reach the head through it.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, final

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.text import TextTower
from robustbench_x.errors import RangeError, SampleError, SourceError

__all__ = [
    "Backbone",
    "Classifier",
    "Encoder",
    "LoadedEncoder",
    "Preprocessing",
    "Tokens",
    "check_range",
    "features_of_looks",
    "tokens_of_looks",
]

_RANGE_SLACK = 1e-4


class Tokens(NamedTuple):
    """One layer's output as tokens."""

    spatial: Tensor
    """`(N, T, D)`: patch tokens, or a CNN stage's positions in row-major order."""
    prefix: Tensor | None
    """`(N, P, D)`: class and register tokens, where the model has them."""


class Backbone(Protocol):
    """What an encoder needs of a network; both methods take *normalised* images of the model's own size."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that `tokens` knows, shallow to deep."""

    def pooled(self, images: Tensor) -> Tensor:
        """Pooled features `(N, D)`."""

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        """Tokens of `layers`, computing no deeper than the deepest of them."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image file becomes the encoder's input, and how pixels are normalised inside it.

    `input_size` is (height, width); `crop_pct` the share of the resized image that the centre crop keeps;
    `mean` and `std` apply to pixels in [0, 1].
    """

    input_size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_pct: float = 1.0
    crop_mode: Literal["center", "squash"] = "center"

    def __call__(self, image: PIL.Image.Image) -> Tensor:
        """Pixels `(3, H, W)` in [0, 1] at the input size, exactly on the 8-bit grid k/255.

        Resizes the shorter side to `input_size / crop_pct` and crops the centre (`squash` ignores the
        aspect ratio). PIL resizes 8-bit images, so the result is 8-bit too: an attack's budget is then
        measured from an image that a file could hold.
        """
        height, width = self.input_size
        image = image.convert("RGB")
        resample = PIL.Image.Resampling[self.interpolation.upper()]
        target_h, target_w = math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)
        if self.crop_mode == "squash":
            image = image.resize((target_w, target_h), resample)
        else:
            scale = max(target_h / image.height, target_w / image.width)
            size = (max(round(image.width * scale), target_w), max(round(image.height * scale), target_h))
            image = image.resize(size, resample)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return flat.view(height, width, 3).permute(2, 0, 1).float().div(255).contiguous()


@final
class Encoder(nn.Module):
    """A frozen pre-trained network as a function of pixels.

    Args:
        source: Where it came from, as the user wrote it (`packaged:efficientnet_lite0`).
        backbone: The network; put into eval mode and frozen here.
        preprocessing: Input size, resize rule, mean and standard deviation.
        sha256: Digest of the weight file, or of the state dict when there is no file.
        license: As published; empty when unknown.
        notes: What a reader of the report must know about these weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        source: str,
        backbone: Backbone,
        preprocessing: Preprocessing,
        sha256: str | None = None,
        license: str = "",  # noqa: A002 - the field's name in every model card
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise SourceError(f"{source}: the backbone is a {type(backbone).__name__}, not a torch.nn.Module")
        self.source = source
        self.backbone = backbone
        self.preprocessing = preprocessing
        self.license = license
        self.notes = tuple(notes)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        self.sha256 = sha256 or state_sha256(backbone.state_dict())
        self.feature_dim = self._probe_dimension()
        if sha256 is None and state_sha256(backbone.state_dict()) != self.sha256:
            raise SourceError(f"{source} changes its own weights or buffers when it runs, so no digest can identify it")

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the images this encoder is audited at."""
        return self.preprocessing.input_size

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names for `tokens`, shallow to deep; empty when the network names none."""
        return self._net.layers

    @property
    def parts(self) -> tuple[str, ...]:
        """Further names for `tokens`: the attention and the MLP inside a layer, as `LAYER.attn` and `LAYER.mlp`."""
        parts: tuple[str, ...] = getattr(self.backbone, "parts", ())
        return parts

    @property
    def num_parameters(self) -> int:
        """Number of weights in the backbone."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features `(N, D)` float32 of `images` `(N, 3, H, W)` in [0, 1]; other sizes are resized inside.

        Raises:
            RangeError: A pixel lies outside [0, 1]; most often the batch was normalised already.
        """
        return self._net.pooled(self._normalise(images)).float()

    def tokens(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tokens]:
        """Token features of the named layers; a shallow request costs a shallow pass.

        Args:
            images: `(N, 3, H, W)` in [0, 1].
            layers: Names from `layers` and `parts`.

        Raises:
            SourceError: A name is not a layer of this encoder.
        """
        unknown = [name for name in layers if name not in (*self.layers, *self.parts)]
        if unknown:
            known = ", ".join(self.layers) or "none: this encoder names no layers"
            raise SourceError(f"{self.source} has no layer {', '.join(unknown)}; it has {known}")
        found = self._net.tokens(self._normalise(images), layers)
        return {
            name: Tokens(t.spatial.float(), None if t.prefix is None else t.prefix.float())
            for name, t in zip(layers, found, strict=True)
        }

    @property
    def _net(self) -> Backbone:
        return self.backbone

    def _normalise(self, images: Tensor) -> Tensor:
        check_range(images)
        if tuple(images.shape[-2:]) != self.input_size:
            images = F.interpolate(images, self.input_size, mode="bilinear", antialias=True, align_corners=False)
        return (images - self.mean) / self.std

    def _probe_dimension(self) -> int:
        with torch.no_grad():
            features = self(torch.full((1, 3, *self.input_size), 0.5, device=self.mean.device))
        if features.ndim != 2:
            raise SourceError(
                f"{self.source} returned features of shape {tuple(features.shape)}; expected (images, dimensions)"
            )
        return int(features.shape[1])


@final
class Classifier(nn.Module):
    """The classifier an encoder was published with: features `(N, D)` to logits `(N, K)`.

    Args:
        layer: Maps pooled features to logits.
        aliases: Class name, WordNet id or index (as text) to the logit's index. None: classes match by index only.
    """

    def __init__(
        self, layer: Callable[[Tensor], Tensor], *, num_classes: int, aliases: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_classes = num_classes
        self.aliases = dict(aliases or {})
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(N, K)`."""
        logits: Tensor = self.layer(features)
        return logits


class LoadedEncoder(NamedTuple):
    """What a source loads: the encoder, its published classifier and its text side where there is one."""

    encoder: Encoder
    classifier: Classifier | None
    text: TextTower | None = None


def check_range(images: Tensor) -> None:
    """Refuses anything but finite float NCHW RGB in [0, 1].

    Raises:
        RangeError: Says what was found.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise RangeError(f"expected float images of shape (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if not images.numel():
        raise RangeError("the batch holds no images")
    low, high = torch.aminmax(images.detach())
    if not (low >= -_RANGE_SLACK and high <= 1 + _RANGE_SLACK):  # also catches NaN
        raise RangeError(
            f"pixels must lie in [0, 1] and be finite, got [{low.item():.4g}, {high.item():.4g}]; "
            "normalisation belongs to the model, so pass plain pixels"
        )


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and bytes of a state dict, the same on every device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def features_of_looks(encoder: Encoder, seen: Tensor) -> Tensor:
    """Features `(N, D)` of images `(N, 3, H, W)`, or their mean over V looks at each `(N, V, 3, H, W)`."""
    if seen.ndim == 4:
        return encoder(seen)  # type: ignore[no-any-return]
    if getattr(encoder.backbone, "is_pixels", False):
        raise SampleError(
            f"the defence gives {seen.shape[1]} looks at an image, and {encoder.source} reads pixels: their mean is an "
            "image that nobody would show it"
        )
    return _mean_of_looks(encoder(seen.flatten(0, 1)), len(seen))


def tokens_of_looks(encoder: Encoder, seen: Tensor, layers: Sequence[str]) -> dict[str, Tokens]:
    """Tokens of `layers`, as `Encoder.tokens`; over several looks at each image their mean."""
    if seen.ndim == 4:
        return encoder.tokens(seen, layers)
    found = encoder.tokens(seen.flatten(0, 1), layers)

    return {
        name: Tokens(
            _mean_of_looks(t.spatial, len(seen)), None if t.prefix is None else _mean_of_looks(t.prefix, len(seen))
        )
        for name, t in found.items()
    }


def _mean_of_looks(values: Tensor, count: int) -> Tensor:
    return values.view(count, -1, *values.shape[1:]).mean(dim=1)
