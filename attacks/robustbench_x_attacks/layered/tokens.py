"""Average token cosine similarity: how far the tokens of two images point the same way, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.encoders.encoder import Tokens
from robustbench_x.errors import AttackError
from robustbench_x.views import EncoderHandle

__all__ = ["POOLED", "Which", "chosen_tokens", "layer_tokens", "token_distance"]

Which = Literal["all", "spatial", "class"]
POOLED = "pooled"
"""The name under which the pooled features count as the deepest layer, with one token."""


def layer_tokens(
    encoder: EncoderHandle, images: Tensor, layers: Sequence[str], which: Which = "all"
) -> dict[str, Tensor]:
    """Tokens `(N, T, D)` of `images` at each of `layers`, from one pass no deeper than the deepest.

    Args:
        encoder: The encoder; the name `pooled` stands for its pooled features, as `(N, 1, D)`.
        images: `(N, 3, H, W)` in [0, 1].
        layers: Names from `encoder.layers` and `encoder.parts`, or `pooled`.
        which: `all` tokens, the `spatial` ones, or the `class` token and its registers, where the layer has them.

    Raises:
        AttackError: The encoder has no such layer, or the layer has no class token.
    """
    known = (*encoder.layers, *encoder.parts, POOLED)
    unknown = [name for name in layers if name not in known]
    if unknown:
        raise AttackError(f"the encoder has no layer '{unknown[0]}'; it has {', '.join(known)}")
    inner = [name for name in layers if name != POOLED]
    found = encoder.tokens(images, inner) if inner else {}
    tokens = {name: chosen_tokens(found[name], which, name) for name in inner}
    if POOLED in layers:
        tokens[POOLED] = encoder.features(images).unsqueeze(1)
    return tokens


def chosen_tokens(tokens: Tokens, which: Which, layer: str) -> Tensor:
    """The tokens of one layer that are compared, `(N, T, D)`, prefix first.

    Raises:
        AttackError: `class` is asked for and the layer has no such token.
    """
    if which == "class":
        if tokens.prefix is None:
            raise AttackError(f"layer {layer} has no class token: use tokens=all or tokens=spatial")
        return tokens.prefix
    if which == "spatial" or tokens.prefix is None:
        return tokens.spatial
    return torch.cat([tokens.prefix, tokens.spatial], dim=1)


def token_distance(
    tokens: Mapping[str, Tensor], clean: Mapping[str, Tensor], centres: Mapping[str, Tensor] | None = None
) -> Tensor:
    """1 - average token cosine similarity at every layer, `(N, L)`, each in [0, 2].

    The cosine is taken token by token and averaged over the tokens of a layer. Its gradient is exactly zero where both
    agree, so an attack must start off the clean image.

    Args:
        tokens: `(N, T, D)` of the adversarial images, by layer.
        clean: The same of the clean images.
        centres: `(D,)` by layer, subtracted from both first: what tokens have in common turns no cosine.
    """
    distances = []
    for name, found in tokens.items():
        other = clean[name]
        if centres is not None:
            found, other = found - centres[name], other - centres[name]
        similarity = F.cosine_similarity(found, other, dim=-1)
        # Two tokens that are both zero (a dead position of a ReLU network) have not moved; their cosine is no number.
        unmoved = (found == 0).all(dim=-1) & (other == 0).all(dim=-1)
        distances.append(1 - similarity.masked_fill(unmoved, 1.0).mean(dim=1))
    return torch.stack(distances, dim=1)
