"""The networks that turn an embedding into noise: the released one, entry by entry, and a small one of our own."""

from collections.abc import Mapping
from typing import Literal, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.errors import AttackError
from robustbench_x_attacks.anyattack.codebook import CompactDecoder

__all__ = [
    "OFFICIAL_SIZE",
    "OFFICIAL_WIDTH",
    "CompactDecoder",
    "Decoder",
    "DecoderKind",
    "Mode",
    "OfficialDecoder",
    "kind_of",
    "load_decoder",
    "make_decoder",
    "mismatch",
    "noise_for",
]

DecoderKind = Literal["compact", "official"]
Mode = Literal["fixed", "compat"]

OFFICIAL_WIDTH = 512
"""Embedding width of the released decoder: CLIP ViT-B/32."""
OFFICIAL_SIZE = 224
"""Side of its noise in pixels."""

_SLOPE = 0.2
_GRID = 14


@final
class _Attention(nn.Module):
    """Linear attention over positions with its own residual (Shen et al. 2021, "Efficient Attention").

    Channels that `heads` does not divide are dropped, and with fewer key channels than heads every head has none: the
    products over an empty axis are zero, so the input passes with the bias of `reprojection` added.
    """

    def __init__(self, channels: int, key_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.keys = nn.Conv2d(channels, key_channels, 1)
        self.queries = nn.Conv2d(channels, key_channels, 1)
        self.values = nn.Conv2d(channels, channels, 1)
        self.reprojection = nn.Conv2d(channels, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        each = self.keys.out_channels // self.heads
        keys, queries = (
            part(images).flatten(2)[:, : each * self.heads].unflatten(1, (self.heads, each))
            for part in (self.keys, self.queries)
        )
        values = self.values(images).flatten(2).unflatten(1, (self.heads, channels // self.heads))
        # (N, heads, keys, values): what each key channel has gathered from all positions.
        context = keys.softmax(dim=3) @ values.transpose(2, 3)
        attended = context.transpose(2, 3) @ queries.softmax(dim=2)
        merged: Tensor = self.reprojection(attended.reshape(count, channels, height, width)) + images
        return merged


@final
class _ResBlock(nn.Module):
    """Two convolutions with batch norm and attention, beside a skip connection.

    Args:
        before: Channels of the input.
        after: Channels of the output.
        key_channels: Of the attention; 0 for none.
    """

    def __init__(self, before: int, after: int, key_channels: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(after)
        self.attention = _Attention(after, key_channels, 8) if key_channels else nn.Identity()
        self.skip_conv = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, images: Tensor) -> Tensor:
        inner = F.leaky_relu(self.bn1(self.conv1(images)), _SLOPE)
        inner = self.attention(self.bn2(self.conv2(inner)))
        return F.leaky_relu(inner + self.skip_conv(images), _SLOPE)


@final
class _UpBlock(nn.Module):
    """Twice the size by nearest neighbour, then a convolution with batch norm."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, padding=1)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, images: Tensor) -> Tensor:
        larger = F.interpolate(images, scale_factor=2, mode="nearest")
        return F.leaky_relu(self.bn(self.conv(larger)), _SLOPE)


@final
class OfficialDecoder(nn.Module):
    """The released network: embeddings `(N, 512)`, as the encoder gives them, to noise `(N, 3, 224, 224)`, unbounded.

    27,926,907 parameters under the names of the released checkpoints. A linear layer makes a 14 x 14 grid of 256
    channels; four times residual block, doubling; a last residual block and a convolution. The quirks are kept: the
    last attention has no key channel per head, so its keys, queries, values and the weights of its reprojection never
    get a gradient; the one before has a single one, over which the softmax of the queries is constantly 1; nothing
    bounds the output.

    Raises:
        AttackError: Another embedding width or image size than the released weights have.
    """

    def __init__(self, width: int = OFFICIAL_WIDTH, size: tuple[int, int] = (OFFICIAL_SIZE, OFFICIAL_SIZE)) -> None:
        super().__init__()
        self.check(width, size)
        self.width, self.size = width, size
        self.fc = nn.Sequential(nn.Linear(width, 256 * _GRID * _GRID))
        channels, blocks = 256, []
        for half in (128, 64, 32, 16):
            blocks += [_ResBlock(channels, channels, channels // 4), _UpBlock(channels, half)]
            channels = half
        self.upsample_blocks = nn.ModuleList([*blocks, _ResBlock(channels, channels, channels // 4)])
        self.final_conv = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Noise, unbounded."""
        images = self.fc(features.float()).view(-1, 256, _GRID, _GRID)
        for block in self.upsample_blocks:
            images = block(images)
        noise: Tensor = self.final_conv(images)
        return noise

    @staticmethod
    def check(width: int, size: tuple[int, int]) -> None:
        """Refuses another embedding width or image size than the released weights have.

        Raises:
            AttackError: It is another; it is named.
        """
        if width != OFFICIAL_WIDTH:
            raise AttackError(
                f"the official decoder reads embeddings of width {OFFICIAL_WIDTH} (CLIP ViT-B/32), this encoder's have "
                f"width {width}; use decoder=compact"
            )
        if size != (OFFICIAL_SIZE, OFFICIAL_SIZE):
            raise AttackError(
                f"the official decoder makes noise of {OFFICIAL_SIZE}x{OFFICIAL_SIZE} pixels, not {size[0]}x{size[1]}; "
                "use decoder=compact"
            )


Decoder = OfficialDecoder | CompactDecoder


def make_decoder(kind: DecoderKind, *, width: int, size: tuple[int, int], seed: int) -> Decoder:
    """A decoder at its start, on the CPU, with torch's usual weights drawn from `seed`.

    Raises:
        AttackError: `official` with another width or size than the released one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _CLASSES[kind](width, size)


def kind_of(state: Mapping[str, Tensor]) -> DecoderKind:
    """Whose state dict it is."""
    return "official" if "fc.0.weight" in state else "compact"


def load_decoder(state: Mapping[str, Tensor], size: tuple[int, int]) -> Decoder:
    """A decoder with the weights of `state`, in eval mode, on their device; no weight is drawn.

    Args:
        state: A state dict of either network.
        size: (height, width) of the noise it was trained for.

    Raises:
        AttackError: Entries are missing, unknown or of another shape; they are listed.
    """
    kind = kind_of(state)
    first = state.get("fc.0.weight" if kind == "official" else "places")
    if first is None or first.ndim != 2:
        raise AttackError(f"this is no decoder of anyattack: it holds {', '.join(sorted(state)[:5]) or 'nothing'}")
    with torch.device("meta"):
        decoder = _like(state, kind, first.shape[1], size)
    if problems := mismatch(decoder, state):
        raise AttackError(f"these are not the weights of a {kind} decoder ({problems})")
    decoder.load_state_dict(dict(state), assign=True)
    return decoder.eval().requires_grad_(False)


def _like(state: Mapping[str, Tensor], kind: DecoderKind, width: int, size: tuple[int, int]) -> Decoder:
    """A decoder of that kind, with as many and as large patterns as `state` has."""
    patterns = state.get("patterns")
    if kind == "official" or patterns is None or patterns.ndim != 4:
        return _CLASSES[kind](width, size)
    return CompactDecoder(width, size, codes=len(patterns), side=patterns.shape[-2:])


def mismatch(decoder: Decoder, state: Mapping[str, Tensor]) -> str:
    """What keeps `state` from being this decoder's state dict, entry by entry; empty when nothing does."""
    wanted = decoder.state_dict()
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)


def noise_for(decoder: nn.Module, features: Tensor, eps: float, mode: Mode = "fixed") -> Tensor:
    """Noise `(N, 3, H, W)` within `eps` for embeddings `(N, D)` that come from the encoder as they are, un-normalised.

    The values are the same in both modes: a hard clamp, as published. They differ in the gradient. `compat` has the
    clamp's own, zero wherever it holds: with embeddings of length 10 that is nine tenths of a fresh official decoder's
    output. `fixed`, which is ours, passes the gradient on where it leads back inside and drops it only where it would
    lead further out. So a decoder means the same under both, and released weights can be trained further under either,
    which a tanh in place of the clamp would not allow.
    """
    raw: Tensor = decoder(features)
    return cast("Tensor", _ClampInward.apply(raw, eps)) if mode == "fixed" else raw.clamp(-eps, eps)


@final
class _ClampInward(torch.autograd.Function):
    """A clamp to +-eps whose gradient vanishes only where a step against it would lead further out."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, raw: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward((raw > eps).to(torch.int8) - (raw < -eps).to(torch.int8))
        return raw.clamp(-eps, eps)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (side,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.where(side * gradient < 0, torch.zeros_like(gradient), gradient), None


_CLASSES: dict[DecoderKind, type[OfficialDecoder] | type[CompactDecoder]] = {
    "compact": CompactDecoder,
    "official": OfficialDecoder,
}
