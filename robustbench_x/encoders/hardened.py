"""A hardened encoder: `hardened:FILE`, the weights that `rbx fit` made of another encoder, in that encoder's place."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from robustbench_x.encoders.encoder import Encoder, LoadedEncoder
from robustbench_x.encoders.loading import load_strictly
from robustbench_x.encoders.source import EncoderOptions, EncoderSource, load_encoder, split_source
from robustbench_x.errors import ConfigError, SourceError, UsageError
from robustbench_x.numbers import format_eps

if TYPE_CHECKING:
    from robustbench_x.fitting.artifact import Artifact
    from robustbench_x.registry import Registry
    from robustbench_x.result import Provenance

__all__ = ["files_behind", "make_source"]

_SCHEME = "hardened"


def make_source(registry: "Registry") -> EncoderSource:
    """The scheme `hardened`; the base encoder is looked up in `registry`."""

    def load(source: str, rest: str, options: EncoderOptions) -> LoadedEncoder:
        return _load(source, Path(rest).expanduser(), options, registry)

    return EncoderSource(
        scheme=_SCHEME,
        usage="hardened:FILE",
        summary="an encoder hardened by rbx fit: FILE's weights in the encoder they were made from",
        load=load,
    )


def files_behind(source: str) -> tuple[Path, ...]:
    """The files that `source` is read from where it is a hardened encoder, the newest first; none for any other.

    Raises:
        SourceError: One of them is missing, damaged, holds no hardened encoder, or is its own base.
    """
    files: list[Path] = []
    while source.startswith(f"{_SCHEME}:"):
        path = Path(split_source(source, kind="encoder")[1]).expanduser()
        if any(path.resolve() == known.resolve() for known in files):
            raise SourceError(f"{source}: the file is its own base, so there is no encoder to start from")
        files.append(path)
        source = _read(source, path).provenance.encoder
    return tuple(files)


def _load(source: str, path: Path, options: EncoderOptions, registry: "Registry") -> LoadedEncoder:
    """The base with its classifier and preprocessing as published, and the hardened weights in place of its own.

    Raises:
        ConfigError: A size is asked for: position embeddings have the size they were trained at.
        SourceError: The file is damaged or no hardened encoder, its base cannot be loaded or is another than the one
            that was hardened, or the weights do not fit it.
    """
    artifact = _read(source, path)
    made = artifact.provenance
    if options.size is not None:
        raise ConfigError(f"{source}: the weights were made for {made.encoder}; drop ?size={options.size}")
    files_behind(source)
    try:
        base = load_encoder(made.encoder, registry, allow_pickle=options.allow_pickle)
    except UsageError as error:
        raise SourceError(f"{source}: the encoder it was made from cannot be loaded: {error}") from error
    if base.encoder.sha256 != made.encoder_sha256:
        raise SourceError(
            f"{source} was made from {made.encoder} with sha256 {made.encoder_sha256}, but that has "
            f"{base.encoder.sha256} here"
        )
    if base.encoder.input_size != made.input_size:
        raise SourceError(
            f"{source} was trained at {made.input_size[0]}x{made.input_size[1]} pixels, but {made.encoder} runs at "
            f"{base.encoder.input_size[0]}x{base.encoder.input_size[1]} here"
        )
    # A copy: what a user's function returns may be in use elsewhere.
    backbone: nn.Module = copy.deepcopy(base.encoder.backbone)
    load_strictly(backbone, artifact.tensors, source)
    note = f"hardened by {made.plugin}{_means(made)} from {made.encoder} with sha256 {made.encoder_sha256}"
    encoder = Encoder(
        source=source,
        backbone=backbone,  # type: ignore[arg-type]  # a copy of a backbone
        preprocessing=base.encoder.preprocessing,
        license=base.encoder.license,
        notes=(*base.encoder.notes, note),
    )
    return LoadedEncoder(encoder, base.classifier)


def _means(made: "Provenance") -> str:
    """What an encoder was hardened with, in words: the images of an attack, or the parameters where there was none."""
    if made.inner is None or made.inner.name == "none":
        return f" ({', '.join(f'{name}={value}' for name, value in made.params.items())})"
    return f" on images of {made.inner.name} ({made.threat.norm} {format_eps(made.threat.eps)}, {made.steps} steps)"


def _read(source: str, path: Path) -> "Artifact":
    """The artefact of a hardened encoder.

    Raises:
        SourceError: It is missing, damaged, or what an attack learned.
    """
    # Here: the artefact's module reads the registry's specs, and the registry this one.
    from robustbench_x.fitting.artifact import read_artifact

    try:
        artifact = read_artifact(path)
    except SourceError as error:
        raise SourceError(f"{source}: {error}") from error
    if artifact.provenance.inner is None:
        raise SourceError(
            f"{source}: {path.name} is what the attack {artifact.provenance.plugin} learned, not a hardened encoder"
        )
    return artifact
