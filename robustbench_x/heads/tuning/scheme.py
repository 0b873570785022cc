"""What a fine-tuning scheme is: which weights of a copy of the public encoder are trained, or added to it."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple, final

import torch
from torch import nn

from robustbench_x.encoders.encoder import Encoder
from robustbench_x.errors import MissingExtraError
from robustbench_x.heads.tuning.recipe import Recipe

__all__ = ["Attached", "Scheme"]


class Attached(NamedTuple):
    """What a training may change: the weights, and how many layers or tensors of the network they belong to."""

    weights: tuple[nn.Parameter, ...]
    targets: int


def _leave(copy: Encoder) -> None:
    """Nothing to do."""


@final
@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way to tune. Its functions work in place on a copy of the public encoder, frozen and in eval mode.

    `shape` then `attach` make the copy trainable and `settle` makes it an ordinary network again; `shape` alone gives
    the network that tuned weights are loaded into later.

    Args:
        name: The head's name.
        recipe: How it is trained.
        attach: Draws initial weights from the generator (on the CPU) and makes trainable what is to be trained; the
            features are still the public ones. Raises SourceError when this encoder offers nothing to train.
        shape: Adds what the tuned network has beyond the public one, with weights of zero, which change no feature.
            Raises SourceError when this encoder has no place for it.
        settle: Takes out what only the training needed, so that the state dict has the names that `shape` left.
        knobs: Hyper-parameters beside the recipe's.
        extra: (package, extra) where a training needs an optional dependency; a saved head needs none.
        documentation: For `rbx describe`: what is tuned, its source, departures from it.
    """

    name: str
    recipe: Recipe
    attach: Callable[[Encoder, torch.Generator], Attached]
    shape: Callable[[Encoder], None] = _leave
    settle: Callable[[Encoder], None] = _leave
    knobs: Mapping[str, Any] = field(default_factory=dict)
    extra: tuple[str, str] | None = None
    documentation: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the training beside its data, as the report stores it."""
        return {
            "scheme": self.name,
            **self.knobs,
            "init": "linear probe on the images that are trained on",
            "optimizer": "AdamW",
            "schedule": "linear warm-up, then half a cosine",
            **dataclasses.asdict(self.recipe),
        }

    @property
    def installed(self) -> bool:
        """Whether a training can run here."""
        return self.extra is None or importlib.util.find_spec(self.extra[0]) is not None

    def require(self) -> None:
        """Checks that a training can run here.

        Raises:
            MissingExtraError: It needs a package that is not installed.
        """
        if self.extra is not None and not self.installed:
            raise MissingExtraError(f"head {self.name}", package=self.extra[0], extra=self.extra[1])

    def packages(self) -> dict[str, str]:
        """Versions of the optional packages that decide what is trained."""
        return {} if self.extra is None else {self.extra[0]: version(self.extra[0])}
