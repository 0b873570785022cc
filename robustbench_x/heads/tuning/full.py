"""Head `full`: every weight of the encoder is fine-tuned."""

import inspect

import torch

from robustbench_x.encoders.encoder import Encoder
from robustbench_x.errors import SourceError
from robustbench_x.heads.tuning.recipe import Recipe
from robustbench_x.heads.tuning.scheme import Attached, Scheme

__all__ = ["full"]


def full(recipe: Recipe | None = None) -> Scheme:
    """Full fine-tuning: all weights of the encoder, batch norm's scale and shift included.

    Departures from common practice: batch norm keeps its public statistics, nothing is dropped out and no image is
    augmented, so that the victim differs from the public encoder by its weights alone.
    """
    return Scheme(
        name="full",
        recipe=recipe or Recipe(encoder_rate=5e-5),
        attach=_attach,
        documentation=inspect.getdoc(full) or "",
    )


def _attach(copy: Encoder, generator: torch.Generator) -> Attached:
    weights = tuple(weight for weight in copy.backbone.parameters() if weight.is_floating_point())
    for weight in weights:
        weight.requires_grad_(True)
    if not weights:
        raise SourceError(f"{copy.source} has no weights that could be tuned; use head linear")
    return Attached(weights, targets=len(weights))
