"""Tensors kept between runs. A damaged file counts as absent: it is rebuilt, never trusted."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from robustbench_x.encoders.encoder import state_sha256

__all__ = ["CachedTensors", "cache_dir", "load", "save"]

_DIGEST = "robustbench_x.digest"


class CachedTensors(NamedTuple):
    """What `load` found."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def cache_dir() -> Path:
    """`$RBX_CACHE`, or `~/.cache/robustbench_x`; not created here."""
    chosen = os.environ.get("RBX_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "robustbench_x"


def save(key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes `tensors` under `key`, atomically: another process sees the old file, the new one or none.

    Args:
        key: A file name without extension; put every input of the tensors into it, by digest.
        tensors: On any device; stored from the CPU.
        metadata: Text stored beside them, covered by the digest.

    Returns:
        The file.
    """
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    stored = dict(metadata or {})
    content = safetensors.torch.save(plain, {**stored, _DIGEST: _digest(plain, stored)})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def load(key: str) -> CachedTensors | None:
    """What `save` stored under `key`; None when there is no such file, or it is not what was written."""
    path = _path(key)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stored = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no Mapping
    except (FileNotFoundError, safetensors.SafetensorError):
        return None
    digest = stored.pop(_DIGEST, None)
    return CachedTensors(tensors, stored) if digest == _digest(tensors, stored) else None


def _path(key: str) -> Path:
    return cache_dir() / f"{key}.safetensors"


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    text = json.dumps(dict(metadata), sort_keys=True) + state_sha256(tensors)
    return hashlib.sha256(text.encode()).hexdigest()
