"""The text side of an image-text encoder: sentences to embeddings in the space of its image features."""

from collections.abc import Sequence
from typing import Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.errors import SourceError

__all__ = ["EmbedTexts", "TextTower"]


class EmbedTexts(Protocol):
    """Embeds texts one batch at a time, on whatever device its weights are."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `(M, D)` of `texts`, of any length."""


@final
class TextTower(nn.Module):
    """Texts to embeddings `(M, D)` float32, L2-normalised, in the space of the encoder's features.

    Args:
        embed: Does the work.
        scale: What cosines are multiplied with to make logits (CLIP's logit scale, about 100).
        sha256: Digest of the weights and the vocabulary.
        module: The network behind `embed`, so that it moves with the tower and can be sealed.
    """

    def __init__(self, *, embed: EmbedTexts, scale: float, sha256: str, module: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = embed
        self.scale = scale
        self.sha256 = sha256
        self.module = module
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of `texts`, in their order.

        Raises:
            SourceError: There is no text, or the embeddings are not `(M, D)` and finite.
        """
        if not texts:
            raise SourceError("there is no text to embed")
        made = self.embed(list(texts)).float()
        if made.ndim != 2 or len(made) != len(texts) or not made.isfinite().all():
            raise SourceError(f"{len(texts)} texts were embedded as {tuple(made.shape)}, not as finite rows")
        return F.normalize(made, dim=1)
