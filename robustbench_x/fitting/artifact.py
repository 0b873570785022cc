"""What a training leaves behind: a `.safetensors` file that knows what it was trained on, and proves it is whole."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pydantic
import safetensors
import safetensors.torch
from torch import Tensor

from robustbench_x.encoders.encoder import state_sha256
from robustbench_x.errors import SourceError
from robustbench_x.plugin import AttackSpec
from robustbench_x.result import FitInfo, Provenance

__all__ = ["Artifact", "check_artifact", "read_artifact", "write_artifact", "write_tensors"]

_FORMAT = "robustbench_x.artifact.1"


class Artifact(NamedTuple):
    """Tensors with their provenance; `sha256` identifies the tensors: equal trainings make equal ones."""

    tensors: dict[str, Tensor]
    provenance: Provenance

    @property
    def sha256(self) -> str:
        """Digest of names, shapes and bytes of the tensors."""
        return state_sha256(self.tensors)

    def info(self, origin: str) -> FitInfo:
        """How a report stores it; `origin` says where it came from."""
        return FitInfo(**self.provenance.model_dump(), sha256=self.sha256, origin=origin)


def write_artifact(path: Path, artifact: Artifact) -> None:
    """Writes `artifact`, atomically: a reader sees the old file, the new one or none.

    Raises:
        SourceError: The name does not end in `.safetensors`, or the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise SourceError(f"an artefact is saved as .safetensors, not as {path.name}")
    text = artifact.provenance.model_dump_json()
    metadata = {"format": _FORMAT, "provenance": text, "seal": _seal(text, artifact.tensors)}
    try:
        write_tensors(path, artifact.tensors, metadata)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a `.safetensors` file atomically; the folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # Not tempfile's: its files are for their owner alone, and artefacts are handed on.
    temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        temporary.write_bytes(safetensors.torch.save(plain, dict(metadata)))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_artifact(path: Path) -> Artifact:
    """The artefact in `path`, proven whole.

    Raises:
        SourceError: The file is missing, no artefact, of another version, or damaged; a damaged one is named with
            the digest it carries and the one its content has.
    """
    if not path.is_file():
        raise SourceError(f"artefact {path}: there is no such file; rbx fit writes one")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no Mapping
    except safetensors.SafetensorError as error:
        raise SourceError(f"artefact {path} is damaged or no safetensors file ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise SourceError(f"artefact {path} was not written by this version of rbx fit (format {_FORMAT})")
    # Over the text as it stands, so that a later version with more fields still finds it whole.
    text = metadata.get("provenance", "")
    carried, found = metadata.get("seal"), _seal(text, tensors)
    if carried != found:
        raise SourceError(f"artefact {path} is damaged: it carries the digest {carried}, its content has {found}")
    try:
        provenance = Provenance.model_validate_json(text)
    except pydantic.ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"])) or "provenance"
        raise SourceError(f"artefact {path} is damaged: its provenance has no readable {field}") from error
    return Artifact(tensors, provenance)


def _seal(provenance: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256((provenance + state_sha256(tensors)).encode()).hexdigest()


def check_artifact(
    artifact: Artifact, *, where: str, spec: AttackSpec, attack: object, source: str, sha256: str, norm: str
) -> None:
    """Refuses an artefact of another attack, encoder, norm or setting, or one that knows a defence.

    Args:
        artifact: What was read.
        where: What the user asked for; opens every error message.
        spec: The attack it is for.
        attack: The same, built: a parameter that was changed from its default must be the artefact's.
        source: The encoder it must have been fitted on, by source.
        sha256: That encoder's digest.
        norm: The audit's norm.

    Raises:
        SourceError: It does not belong; for another encoder, both digests are named.
    """
    made = artifact.provenance
    if made.plugin != spec.name:
        raise SourceError(f"{where} was fitted by {made.plugin}, not by {spec.name}")
    if made.encoder_sha256 != sha256:
        raise SourceError(
            f"{where} was fitted on {made.encoder} with sha256 {made.encoder_sha256}, but {source} has {sha256}; "
            f"to judge it on another encoder on purpose, name the one it was fitted on: {spec.name}.fit_encoder="
            f"{made.encoder}"
        )
    if made.threat.norm != norm:
        raise SourceError(f"{where} was fitted for norm {made.threat.norm}, but the budget here is {norm}")
    if made.defense != "none":
        raise SourceError(
            f"{where} was fitted through the defence {made.defense}; an artefact that is handed in must know none"
        )
    for p in spec.params:
        asked = getattr(attack, p.name)
        held = made.params.get(p.name, asked)
        if p.name in made.params and asked != p.default and _plain(asked) != _plain(held):
            raise SourceError(f"{where} was fitted with {p.name}={held}, not {asked}; leave {spec.name}.{p.name} out")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, (list, tuple)) else value
