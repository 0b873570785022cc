"""What a tuned encoder has otherwise than the public one: taken out, stored, and put on a copy again."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from robustbench_x.encoders.encoder import Encoder
from robustbench_x.errors import SourceError
from robustbench_x.heads.tuning.scheme import Scheme

__all__ = ["copied", "join_tensors", "overlay_of", "rebuild", "split_tensors"]

_PREFIX = "encoder."
"""Opens the names of the encoder's tensors wherever they are stored beside the classifier's."""


def copied(encoder: Encoder) -> Encoder:
    """A copy of `encoder` that shares nothing with it, on the same device.

    Raises:
        SourceError: The network holds something that cannot be copied, or hands its own weights to the copy.
    """
    try:
        made = copy.deepcopy(encoder)
    except Exception as error:
        raise SourceError(
            f"{encoder.source} cannot be tuned: its network cannot be copied ({type(error).__name__}: {error}); use "
            "head linear"
        ) from error
    own = {tensor.data_ptr() for tensor in (*encoder.parameters(), *encoder.buffers()) if tensor.numel()}
    if any(tensor.data_ptr() in own for tensor in (*made.parameters(), *made.buffers()) if tensor.numel()):
        raise SourceError(
            f"{encoder.source} cannot be tuned: a copy of its network shares its weights; use head linear"
        )
    return made


def overlay_of(work: Encoder, scheme: Scheme, encoder: Encoder) -> dict[str, Tensor]:
    """What `work`, tuned by `scheme`, has otherwise than the public `encoder`, or beyond it.

    Returns:
        Tensors by their names in the state dict of `work`'s backbone, on the CPU.
    """
    plain = copied(encoder)
    scheme.shape(plain)
    public, tuned = plain.backbone.state_dict(), work.backbone.state_dict()
    assert public.keys() == tuned.keys(), f"{scheme.name} left other weights behind than it may"
    return {n: t.detach().cpu().clone() for n, t in tuned.items() if not torch.equal(t, public[n])}


def rebuild(scheme: Scheme, encoder: Encoder, overlay: Mapping[str, Tensor], *, sha256: str | None = None) -> Encoder:
    """The tuned encoder, on the CPU, from the public one and what differs from it.

    Args:
        scheme: How it was tuned.
        encoder: The public encoder, on any device; left alone.
        overlay: As `overlay_of` returns it.
        sha256: The digest it must have.

    Raises:
        SourceError: The overlay does not fit this encoder, or the result has another digest.
    """
    work = copied(encoder).cpu()
    scheme.shape(work)
    own = work.backbone.state_dict()
    for name, tensor in overlay.items():
        if name not in own:
            raise SourceError(f"tuned weights do not fit {encoder.source}: it has no {name}")
        if own[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            raise SourceError(f"tuned weights do not fit {encoder.source}: {name} has shape {shapes}")
    work.backbone.load_state_dict(dict(overlay), strict=False)
    tuned = Encoder(
        source=f"{encoder.source} ({scheme.name})",
        backbone=work.backbone,
        preprocessing=encoder.preprocessing,
        license=encoder.license,
        notes=encoder.notes,
    )
    if sha256 is not None and tuned.sha256 != sha256:
        raise SourceError(
            f"tuned weights on top of {encoder.source} give sha256 {tuned.sha256}, not {sha256}: the public weights "
            "are not those it was tuned from"
        )
    return tuned


def join_tensors(classifier: Mapping[str, Tensor], overlay: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both under names of their own."""
    return {**classifier, **{_PREFIX + name: tensor for name, tensor in overlay.items()}}


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `join_tensors` joined: the classifier's tensors and the encoder's."""
    classifier = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
    overlay = {n.removeprefix(_PREFIX): t for n, t in tensors.items() if n.startswith(_PREFIX)}
    return classifier, overlay
