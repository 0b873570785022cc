"""tecoa: text-guided contrastive adversarial fine-tuning (Mao et al., ICLR 2023), with the teacher's labels."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import final

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.hardening import HardeningSpec, HardenView
from robustbench_x.plugin import Trainer, param
from robustbench_x.randomness import derive_seed
from robustbench_x_defenses.hardening.embedding import EmbeddingTrainer, Recipe

__all__ = ["SPEC", "AnchorLoss", "Tecoa", "make_anchors", "read_anchors"]

_ROUNDS = 10
_BATCH = 32
_SAME = 1e-6
"""Directions whose cosine is closer to 1 than this are one."""


@final
@dataclass(frozen=True, kw_only=True)
class Tecoa(Recipe):
    """TeCoA (Mao et al., "Understanding Zero-Shot Adversarial Robustness", ICLR 2023, arXiv 2212.07016).

    Minimises the cross-entropy of `scale` times the cosines between the student's embedding of an adversarial image
    and K class anchors, which stay as they are. Published anchors are CLIP's text embeddings of class prompts: compute
    them once with the text tower and pass `anchors=FILE`, a safetensors file with a tensor `anchors` (K, D), where D is
    the width of this encoder's pooled features, which must be the space that the texts live in.

    Without a file the anchors are K directions of the teacher's own embeddings of the clean surrogate images, by
    spherical k-means (k-means++ start by the seed, ten rounds). They need no label and no text, and they ask the
    student to keep an attacked image on the side of the borders that the original had it on.

    Published: scale 100 and the labels of the training set. The authors' code trains CLIP ViT-B/32 by SGD with momentum
    0.9, at linf 2/255 in five inner steps by default. The comparison in FARE's release trains ViT-L/14 as FARE does
    (AdamW, 1e-5, decay 1e-4, 20,000 steps of 128 images, ten inner steps, 2/255 or 4/255), and that can be set here:
    `-p steps=20000 -p batch=128 -p rate=1e-5 -p 'inner=embed?loss=l2&steps=10' -p anchors=FILE`.

    Departures:
        The label of an image is the teacher's nearest anchor of the clean image, since surrogate images carry no labels
        here; with a file of class prompts that is the original's zero-shot prediction, mistakes included.
        The inner attack is `embed`, which drives the embedding away from the clean one; the published one maximises
        the cross-entropy that is trained on. Attacks of an encoder alone know no anchors here.
        Anchors by k-means are ours. They say what the surrogate images differ in, not what the words of a task do.
        The optimiser, the updates in eval mode and the defaults of `steps`, `batch`, `rate` and the inner steps are
        those of `fare`; `clean` adds the cross-entropy of clean images, and 0, as published, leaves it out.
    """

    inner: str = param("embed?loss=l2&steps=3", "attack that makes the images; published: the loss itself, by PGD")
    anchors: str = param("", "safetensors file with a tensor anchors (K, D); empty: k-means of the teacher's")
    classes: int = param(16, "anchors where there is no file, at most one per image; published: ImageNet's 1000")
    scale: float = param(100.0, "what cosines are multiplied by; published: 100")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise ValueError(f"classes={self.classes} must be at least 2")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale={self.scale} must be positive")
        if self.anchors:
            read_anchors(self.file)

    @property
    def file(self) -> Path:
        """Where the anchors are read from."""
        return Path(self.anchors).expanduser()

    def trainer(self, view: HardenView) -> Trainer:
        """A training from its start; the anchors are read or made here."""
        if self.anchors:
            anchors = read_anchors(self.file)
            if anchors.shape[1] != view.student.feature_dim:
                raise ValueError(
                    f"{self.anchors}: anchors have {anchors.shape[1]} dimensions, but this encoder's features have "
                    f"{view.student.feature_dim}"
                )
        else:
            anchors = make_anchors(_embeddings(view), self.classes, seed=derive_seed(view.seed, "anchors"))
        return EmbeddingTrainer(view, self, AnchorLoss(anchors.float().to(view.device), self.scale))


@final
@dataclass(frozen=True)
class AnchorLoss:
    """Cross-entropy of scaled cosines to `anchors` `(K, D)`; the label is the anchor that is nearest to the teacher."""

    anchors: Tensor
    scale: float

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean over N images of embeddings `(N, D)` by the student and, clean, by the teacher: 0-d."""
        directions = F.normalize(self.anchors, dim=1).t()
        labels = (F.normalize(teacher, dim=1) @ directions).argmax(dim=1)
        cosines: Tensor = F.normalize(student, dim=1) @ directions
        return F.cross_entropy(self.scale * cosines, labels)


def read_anchors(path: Path) -> Tensor:
    """The tensor `anchors` `(K, D)` float32 of a safetensors file.

    Raises:
        ValueError: The file is missing or damaged, or what it holds are not two or more finite, non-zero vectors.
    """
    if not path.is_file():
        raise ValueError(f"anchors={path}: there is no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            anchors: Tensor | None = file.get_tensor("anchors").float() if "anchors" in names else None
    except safetensors.SafetensorError as error:
        raise ValueError(f"anchors={path}: it is damaged or no safetensors file ({error})") from error
    if anchors is None:
        raise ValueError(f"anchors={path}: it has no tensor 'anchors'; it has {', '.join(names) or 'none'}")
    if anchors.ndim != 2 or len(anchors) < 2:
        raise ValueError(f"anchors={path}: shape {tuple(anchors.shape)}, expected (K, D) with K of at least 2")
    if not anchors.isfinite().all() or not anchors.any(dim=1).all():
        raise ValueError(f"anchors={path}: an anchor is zero or not finite")
    return anchors


def make_anchors(embeddings: Tensor, count: int, *, seed: int) -> Tensor:
    """Spherical k-means: `count` unit vectors `(K, D)` float64 that embeddings `(M, D)` gather around.

    The start is k-means++ on the distance 1 - cos. A cluster that loses all its members keeps its direction. Fewer
    are returned where fewer directions differ.

    Raises:
        ValueError: All embeddings have one direction or none, so there is nothing to tell apart.
    """
    vectors = embeddings.detach().cpu().double()
    units = F.normalize(vectors[vectors.any(dim=1)], dim=1)
    if not len(units):
        raise ValueError("the embedding of every surrogate image is zero, so no anchors can be told apart")
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(units), (1,), generator=generator))]
    gaps = 1 - units @ units[chosen[0]]
    while len(chosen) < count and float(gaps.max()) > _SAME:
        chosen.append(int(torch.multinomial(gaps.where(gaps > _SAME, 0.0), 1, generator=generator)))
        gaps = torch.minimum(gaps, 1 - units @ units[chosen[-1]])
    if len(chosen) < 2:
        raise ValueError("the surrogate images have one and the same embedding, so no anchors can be told apart")
    anchors = units[chosen]
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(anchors).index_add_(0, (units @ anchors.t()).argmax(dim=1), units)
        norms = sums.norm(dim=1, keepdim=True)
        anchors = torch.where(norms > _SAME, sums / norms.clamp(min=_SAME), anchors)
    return anchors


@torch.no_grad()
def _embeddings(view: HardenView) -> Tensor:
    """The teacher's embeddings of all surrogate images, clean, `(M, D)`."""
    total = len(view.surrogate)
    places = [torch.arange(start, min(start + _BATCH, total)) for start in range(0, total, _BATCH)]
    return torch.cat([view.teacher.features(view.surrogate.batch(part)) for part in places])


SPEC = HardeningSpec(
    name="tecoa",
    summary="adversarial images kept at the anchor (a class prompt, or a cluster) that the original put them at",
    factory=Tecoa,
    source="Mao et al. 2023 (ICLR), arXiv 2212.07016",
    reads=lambda hardening: (hardening.file,) if hardening.anchors else (),
)
