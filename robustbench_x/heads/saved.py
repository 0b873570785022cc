"""Heads as files: a `.safetensors` that knows its classes, and the encoder whose features it reads.

A tuned head holds what its encoder has otherwise than the public one, under `encoder.`, beside its classifier.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from robustbench_x.encoders.encoder import Encoder, state_sha256
from robustbench_x.encoders.loading import file_sha256
from robustbench_x.errors import SourceError
from robustbench_x.heads.base import FittedHead, HeadSpec
from robustbench_x.heads.tuning.overlay import join_tensors, rebuild, split_tensors

if TYPE_CHECKING:
    from robustbench_x.registry import Registry

__all__ = ["read_head", "save_head"]

_FORMAT = "robustbench_x.head.1"
_KEYS = ("format", "kind", "classes", "feature_dim", "encoder_sha256", "settings", "digest")


def save_head(head: FittedHead, path: Path) -> None:
    """Writes a fitted or tuned head, so that `file:PATH` judges with it again on the same public encoder.

    Atomic: a reader sees the old file, the new one or none.

    Raises:
        SourceError: The head was not fitted here (`native`), so nothing could rebuild it.
    """
    missing = [key for key in ("kind", "feature_dim", "encoder_sha256") if key not in head.settings]
    if missing:
        raise SourceError(f"head {head.name} cannot be saved: only a fitted head can, such as linear or knn")
    if path.suffix != ".safetensors":
        raise SourceError(f"a head is saved as .safetensors, not as {path.name}")
    tuned = {} if head.encoder is None else head.encoder.backbone.state_dict()
    state = join_tensors(head.layer.state_dict(), {name: tuned[name] for name in head.changed})
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    metadata = {
        "format": _FORMAT,
        "kind": str(head.settings["kind"]),
        "classes": json.dumps(sorted(head.aliases, key=head.aliases.__getitem__)),
        "feature_dim": str(head.settings["feature_dim"]),
        "encoder_sha256": str(head.settings["encoder_sha256"]),
        "settings": json.dumps(head.settings, sort_keys=True),
    }
    metadata["digest"] = _digest(state, metadata)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(safetensors.torch.save(state, metadata))
    temporary.replace(path)


def read_head(path: Path, *, name: str, encoder: Encoder, registry: "Registry") -> FittedHead:
    """The head that `save_head` wrote, checked to be whole and to belong to `encoder`.

    Args:
        path: The file.
        name: As the user asked for it; opens every error message.
        encoder: The public encoder, on any device: its features are read, or a copy of it gets the tuned weights.
        registry: Where its kind is looked up.

    Returns:
        The head, on the CPU.

    Raises:
        SourceError: The file is missing, damaged, no saved head, or was fitted on another encoder or at another size.
    """
    state, metadata = _read(path, name)
    if metadata["encoder_sha256"] != encoder.sha256:
        raise SourceError(
            f"head {name} was fitted on an encoder with sha256 {metadata['encoder_sha256']}, but {encoder.source} has "
            f"{encoder.sha256}; fit a head on this encoder"
        )
    if metadata["feature_dim"] != str(encoder.feature_dim):
        raise SourceError(
            f"head {name} reads features of dimension {metadata['feature_dim']}, but {encoder.source} has "
            f"{encoder.feature_dim}; fit a head on this encoder"
        )
    classes: list[str] = json.loads(metadata["classes"])
    settings: dict[str, Any] = json.loads(metadata["settings"])
    spec = registry.heads[metadata["kind"]]
    if spec.restore is None:
        raise SourceError(f"head {name} is of the kind {spec.name}, which cannot be restored from a file")
    state, overlay = split_tensors(state) if spec.tune is not None else (state, {})
    head = FittedHead(
        name=name,
        layer=spec.restore(state),
        num_classes=len(classes),
        aliases={label: index for index, label in enumerate(classes)},
        settings={**settings, "file_sha256": file_sha256(path)},
        task=spec.task,
        encoder=_tuned(spec, encoder, overlay, settings, name),
        changed=sorted(overlay),
    )
    shape = tuple(head(torch.zeros(1, encoder.feature_dim)).shape)
    if shape != (1, len(classes)):
        raise SourceError(f"head {name} returned logits of shape {shape}; expected (1, {len(classes)})")
    return head


def _tuned(
    spec: HeadSpec, encoder: Encoder, overlay: Mapping[str, Tensor], settings: Mapping[str, Any], name: str
) -> Encoder | None:
    """The tuned encoder of a head that has one."""
    if spec.tune is None:
        return None
    size = tuple(settings["input_size"])
    if size != encoder.input_size:
        raise SourceError(
            f"head {name} was tuned at {size[0]} x {size[1]} pixels, but {encoder.source} runs at "
            f"{encoder.input_size[0]} x {encoder.input_size[1]}; write ?size={size[0]} behind the encoder"
        )
    try:
        return rebuild(spec.tune, encoder, overlay, sha256=settings["tuned_sha256"])
    except SourceError as error:
        raise SourceError(f"head {name}: {error}") from error


def _read(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise SourceError(f"head {name}: there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no Mapping
    except safetensors.SafetensorError as error:
        raise SourceError(f"head {name}: {path.name} is damaged or no safetensors file ({error})") from error
    if any(key not in metadata for key in _KEYS) or metadata["format"] != _FORMAT:
        raise SourceError(f"head {name}: {path.name} is no head that robustbench_x saved")
    if metadata.pop("digest") != _digest(state, metadata):
        raise SourceError(f"head {name}: {path.name} is damaged, its content does not match its digest")
    return state, metadata


def _digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    text = json.dumps(dict(metadata), sort_keys=True) + state_sha256(state)
    return hashlib.sha256(text.encode()).hexdigest()
