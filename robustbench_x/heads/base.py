"""What a head is: features of one encoder to logits over the classes of one data set.

A head reads the features of the public encoder, or, when it was tuned together with a copy of it, those of that copy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from robustbench_x.data.dataset import Item
from robustbench_x.encoders.encoder import Encoder
from robustbench_x.errors import DataError, near_matches
from robustbench_x.heads.tuning.scheme import Scheme

__all__ = ["CAPTIONED", "FittedHead", "HeadSpec", "Ranking", "Task"]

Task = Literal["classification", "retrieval", "image_text", "entailment", "captioning"]
CAPTIONED: tuple[Task, ...] = ("image_text", "entailment", "captioning")
"""Tasks whose logits stand for groups of captions, each the captions of one image."""


class Ranking(NamedTuple):
    """How well a gallery is ranked, `(N,)` each: average precision, place of the first relevant item (inf: none)."""

    precision: Tensor
    first: Tensor


@final
class FittedHead(nn.Module):
    """A head ready to judge with: frozen, in eval mode, differentiable in its features.

    Args:
        name: As the user asked for it (`linear`, `file:head.safetensors`).
        layer: Maps features `(N, D)` to logits `(N, K)`.
        num_classes: K.
        aliases: Class names (and ids) to logit index.
        settings: How it was made, for the report.
        task: `retrieval` when the layer also has `rank(features, labels)`. Of those in `CAPTIONED` it has
            `scores(features)`, and its logits stand for groups of captions, with `aliases` by image id; `captioning`
            has `say(features)` too.
        encoder: The tuned encoder whose features it reads; None: those of the public one.
        changed: Names in that encoder's backbone's state dict that the public one lacks or has otherwise.
    """

    def __init__(
        self,
        *,
        name: str,
        layer: nn.Module,
        num_classes: int,
        aliases: Mapping[str, int],
        settings: Mapping[str, Any] | None = None,
        task: Task = "classification",
        encoder: Encoder | None = None,
        changed: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.task = task
        self.layer = layer
        self.num_classes = num_classes
        self.aliases = dict(aliases)
        self.settings = dict(settings or {})
        self.encoder = encoder
        self.changed = tuple(changed)
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(N, K)` float32 of features `(N, D)` of its own encoder where it has one, else of the public one."""
        logits: Tensor = self.layer(features)
        return logits.float()

    def rank(self, features: Tensor, labels: Tensor) -> Ranking:
        """How well the gallery is ranked for queries of `labels` `(N,)`; only where the task is `retrieval`."""
        ranking: Ranking = self.layer.rank(features, labels)  # type: ignore[operator]
        return ranking

    def scores(self, features: Tensor) -> list[Tensor]:
        """Per group of captions, the scores `(N, texts of the group)`; only where the task is one of `CAPTIONED`."""
        scores: Tensor = self.layer.scores(features)  # type: ignore[operator]
        sizes = torch.bincount(self.layer.group, minlength=self.num_classes)  # type: ignore[arg-type]
        return list(torch.split(scores, sizes.tolist(), dim=1))

    def say(self, features: Tensor) -> list[str]:
        """What the model says of each image; only where the task is `captioning`."""
        said: list[str] = self.layer.say(features)  # type: ignore[operator]
        return said

    def labels(self, classes: Sequence[str], items: Sequence[Item]) -> Tensor:
        """The logit index that is right for each of `items`, `(len(items),)` int64.

        Raises:
            DataError: See `match`.
        """
        if self.task in CAPTIONED:
            return torch.tensor([self.aliases[item.id] for item in items], dtype=torch.long)
        return self.match(classes)[[item.label for item in items]]

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name of every logit, in order: of several aliases the last that is registered (a word, not an id)."""
        names = {index: alias for alias, index in self.aliases.items()}
        return tuple(names.get(index, str(index)) for index in range(self.num_classes))

    def match(self, classes: Sequence[str]) -> Tensor:
        """The logit index of each class name, `(len(classes),)` int64.

        Raises:
            DataError: A class is unknown to this head, or two classes fall on one logit.
        """
        unknown = [name for name in classes if name not in self.aliases]
        if unknown:
            near = near_matches(unknown[0], self.aliases)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise DataError(
                f"head {self.name} knows no class named {', '.join(unknown[:5])}{hint}; it has {self.num_classes} "
                "classes, matched by index, WordNet id or name"
            )
        index = [self.aliases[name] for name in classes]
        if len(set(index)) != len(index):
            twice = next(name for name, i in zip(classes, index, strict=True) if index.count(i) > 1)
            raise DataError(f"head {self.name}: class '{twice}' and another one mean the same logit")
        return torch.tensor(index, dtype=torch.long)


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """A kind of head as the registry knows it.

    Args:
        name: What `--head` takes.
        summary: One line for the catalogue.
        fit: `(features (N, D), labels (N,), num_classes, seed) -> nn.Module`; None when it is not fitted.
        restore: Rebuilds the module from a saved state dict; None when it is not fitted.
        settings: Hyper-parameters, stored in the report and part of the cache key.
        tune: How a copy of the encoder is fine-tuned with it, in place of `fit`; None when the encoder stays as it is.
    """

    name: str
    summary: str
    fit: Callable[[Tensor, Tensor, int, int], nn.Module] | None = None
    restore: Callable[[Mapping[str, Tensor]], nn.Module] | None = None
    settings: Mapping[str, Any] | None = None
    task: Task = "classification"
    tune: Scheme | None = None
