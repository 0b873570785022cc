"""Heads made of text: classes by their names (zero-shot), and captions to be ranked by each image.

They read an image-text encoder: its features and its texts share one space, where cosines count. Nothing is trained, so
they need no training split; what they ask of the encoder is a text side (`LoadedEncoder.text`).
"""

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.data.dataset import Dataset, Item
from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.encoders.text import TextTower
from robustbench_x.errors import DataError, SourceError
from robustbench_x.heads.base import FittedHead, HeadSpec

__all__ = ["CAPTIONS", "TEMPLATES", "ZERO_SHOT", "CaptionHead", "build_captions", "build_zero_shot", "groups_of"]

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "a close-up photo of a {}.")
"""Prompts whose embeddings are averaged per class, as in Radford et al. 2021; a short, general set of our own."""

_PART = 256


@final
class CaptionHead(nn.Module):
    """Features `(N, D)` to the best scaled cosine of each group of texts, `(N, G)`.

    Args:
        embeddings: `(M, D)`, L2-normalised.
        group: `(M,)`, the group of each text, 0 to G-1.
        scale: Of the cosines.
    """

    embeddings: Tensor
    group: Tensor

    def __init__(self, embeddings: Tensor, group: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("group", group)
        self.scale = scale
        self._groups = int(group.max()) + 1

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(N, G)`."""
        scores = self.scores(features)
        best = scores.new_full((len(scores), self._groups), -torch.inf)
        return best.scatter_reduce(1, self.group.expand_as(scores), scores, reduce="amax") * self.scale

    def scores(self, features: Tensor) -> Tensor:
        """Cosines `(N, M)` with every text, group by group."""
        return F.normalize(features.float(), dim=1) @ self.embeddings.T


def build_zero_shot(loaded: LoadedEncoder, dataset: Dataset) -> FittedHead:
    """One text per class: the mean of its name in every template.

    Raises:
        SourceError: The encoder reads no text.
    """
    tower = _tower(loaded, "zero_shot")
    prompts = [template.format(word) for word in dataset.words for template in TEMPLATES]
    each = _embedded(tower, prompts).view(len(dataset.classes), len(TEMPLATES), -1)
    classes = F.normalize(each.mean(dim=1), dim=1)
    return FittedHead(
        name="zero_shot",
        layer=CaptionHead(classes, torch.arange(len(classes)), tower.scale),
        num_classes=len(classes),
        aliases={label: index for index, label in enumerate(dataset.classes)},
        settings={"templates": list(TEMPLATES), "scale": tower.scale, "text_sha256": tower.sha256},
    )


def build_captions(loaded: LoadedEncoder, gallery: Sequence[Item]) -> FittedHead:
    """Every caption of the evaluated images as a text to rank; images of the very same captions are one group.

    Raises:
        SourceError: The encoder reads no text.
        DataError: An image has no caption.
    """
    tower = _tower(loaded, "captions")
    texts, group, aliases = groups_of(gallery, "captions")
    count = int(group.max()) + 1
    return FittedHead(
        name="captions",
        layer=CaptionHead(_embedded(tower, texts), group, tower.scale),
        num_classes=count,
        aliases=aliases,
        settings={"texts": len(texts), "groups": count, "scale": tower.scale, "text_sha256": tower.sha256},
        task="image_text",
    )


def groups_of(gallery: Sequence[Item], head: str) -> tuple[list[str], Tensor, dict[str, int]]:
    """Every caption group by group, the group of each `(M,)`, and the group of each image by its id.

    Raises:
        DataError: An image has no caption.
    """
    bare = [item.id for item in gallery if not item.captions]
    if bare:
        raise DataError(f"head {head}: the data has no caption for {bare[0]}; use data captions:FILE.json")
    groups: dict[tuple[str, ...], int] = {}
    aliases = {item.id: groups.setdefault(item.captions, len(groups)) for item in gallery}
    texts = [text for captions in groups for text in captions]
    return texts, torch.tensor([index for captions, index in groups.items() for _ in captions]), aliases


def _tower(loaded: LoadedEncoder, head: str) -> TextTower:
    if loaded.text is None:
        raise SourceError(
            f"head {head} needs an encoder that reads text, and {loaded.encoder.source} does not; "
            "use packaged:conse_minilm, hf:... or open_clip:..."
        )
    return loaded.text


def _embedded(tower: TextTower, texts: Sequence[str]) -> Tensor:
    return torch.cat([tower(texts[start : start + _PART]) for start in range(0, len(texts), _PART)])


ZERO_SHOT = HeadSpec(name="zero_shot", summary="class names as prompts, for an encoder that reads text; no training")
CAPTIONS = HeadSpec(
    name="captions",
    summary="image-text retrieval: captions ranked by each image, images by each caption (TR and IR R@1/5/10)",
    task="image_text",
)
