"""What an attack that aims reads from its view: target images, their captions, and the encoders it runs on."""

import torch
from torch import Tensor

from robustbench_x.errors import AttackError
from robustbench_x.views import EncoderHandle, EncoderView

__all__ = ["captions_of", "ensemble", "goals_of", "sources_in", "targets_of"]


def targets_of(view: EncoderView) -> Tensor:
    """The target images `(N, 3, H, W)` in [0, 1].

    Raises:
        AttackError: There is none.
    """
    if view.targets is None:
        raise AttackError("this attack aims at a target image per sample, and it was handed none")
    return view.targets


def captions_of(view: EncoderView) -> tuple[str, ...]:
    """A caption of every target.

    Raises:
        AttackError: The data has none.
    """
    if view.target_texts is None:
        raise AttackError(
            "this attack aims at the caption of each target, and this data has none: choose data with captions, or "
            "attackvlm_ii, which aims at the image"
        )
    return view.target_texts


def ensemble(view: EncoderView, *, own: bool, named: str) -> tuple[EncoderHandle, ...]:
    """The encoders an attack runs on: the audited one if `own`, and its partners, none of them twice.

    Raises:
        AttackError: There is none.
    """
    partners = [partner for partner in view.partners if partner.sha256 != view.encoder.sha256]
    found = (*([view.encoder] if own else []), *partners)
    if not found:
        raise AttackError(
            f"there is no encoder but the audited one ({named or 'none named'}); name another, or own=true"
        )
    return found


def sources_in(encoders: str) -> tuple[str, ...]:
    """The encoder sources in a list by comma."""
    return tuple(source.strip() for source in encoders.split(",") if source.strip())


@torch.no_grad()
def goals_of(encoders: tuple[EncoderHandle, ...], targets: Tensor) -> list[Tensor]:
    """Features `(N, D)` of the targets, per encoder."""
    return [encoder.features(targets) for encoder in encoders]
