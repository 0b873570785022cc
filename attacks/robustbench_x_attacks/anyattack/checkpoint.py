"""Decoders in files: the released checkpoints, and what an artefact of ours holds."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_x.errors import AttackError, SourceError
from robustbench_x.fitting import read_artifact
from robustbench_x_attacks.anyattack.decoder import (
    OFFICIAL_SIZE,
    Decoder,
    OfficialDecoder,
    load_decoder,
    mismatch,
)

__all__ = ["Learned", "pack", "read_decoder", "read_released", "unpack"]

_PREFIX = "decoder."
_SAVED = "decoder_state_dict"
_PARALLEL = "module."


class Learned(NamedTuple):
    """A trained decoder, and the digest of the encoder whose embeddings it reads."""

    decoder: Decoder
    encoder_sha256: str


def read_released(path: Path) -> dict[str, Tensor]:
    """The decoder's state dict in a checkpoint of the released layout (`coco_cos.pt` and its like), on the CPU.

    A pickled dict with `decoder_state_dict`, whose names may carry the `module.` of a parallel training; optimiser,
    scheduler and counters beside it are left alone. It is read as tensors and plain values only: nothing in it is run.

    Raises:
        SourceError: There is no such file, it holds anything else, or entries are missing or unknown; they are listed.
    """
    if not path.is_file():
        raise SourceError(f"checkpoint {path}: there is no such file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise SourceError(
            f"checkpoint {path} cannot be read as tensors alone, which is all that is ever read: {_first_line(error)}"
        ) from error
    held = saved.get(_SAVED) if isinstance(saved, dict) else None
    if not isinstance(held, dict):
        known = ", ".join(map(str, list(saved)[:5])) if isinstance(saved, dict) else type(saved).__name__
        raise SourceError(f"checkpoint {path} has no {_SAVED}; it holds {known or 'nothing'}")
    state = {str(name).removeprefix(_PARALLEL): tensor for name, tensor in held.items()}
    with torch.device("meta"):
        official = OfficialDecoder()
    strange = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    problems = f"no tensors: {', '.join(strange)}" if strange else mismatch(official, state)
    if problems:
        raise SourceError(f"checkpoint {path} does not hold the released decoder ({problems})")
    return state


def read_decoder(path: Path) -> Decoder:
    """The decoder in a file: an artefact of `rbx fit` (`.safetensors`), else a checkpoint of the released layout.

    Raises:
        SourceError: It cannot be read, or holds no decoder.
    """
    if path.suffix != ".safetensors":
        return load_decoder(read_released(path), (OFFICIAL_SIZE, OFFICIAL_SIZE))
    try:
        return unpack(read_artifact(path).tensors).decoder
    except AttackError as error:
        raise SourceError(f"artefact {path}: {error}") from error


def pack(state: Mapping[str, Tensor], *, size: tuple[int, int], encoder_sha256: str) -> dict[str, Tensor]:
    """The tensors of an artefact: a decoder's state dict, the (height, width) of its noise, its encoder's digest."""
    return {
        **{f"{_PREFIX}{name}": tensor.detach().clone() for name, tensor in state.items()},
        "size": torch.tensor(size),
        "encoder_sha256": torch.tensor(list(encoder_sha256.encode()), dtype=torch.uint8),
    }


def unpack(tensors: Mapping[str, Tensor]) -> Learned:
    """What `pack` packed, on the tensors' device, ready to run.

    Raises:
        AttackError: It is something else.
    """
    absent = [name for name in ("size", "encoder_sha256") if name not in tensors]
    if absent:
        raise AttackError(f"this artefact holds no decoder of anyattack: it lacks {', '.join(absent)}")
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    height, width = tensors["size"].tolist()
    return Learned(load_decoder(state, (height, width)), bytes(tensors["encoder_sha256"].tolist()).decode())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
