"""Encoders by timm name: `timm:NAME` from the hub, `timm:NAME@FILE` from a local checkpoint."""

import socket
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder, LoadedEncoder, Preprocessing
from robustbench_x.encoders.hub import NETWORK_ERRORS
from robustbench_x.encoders.loading import Checkpoint, file_sha256, load_strictly, read_state, strip_prefix
from robustbench_x.encoders.source import EncoderOptions, EncoderSource
from robustbench_x.encoders.timm_backbone import TimmBackbone, split_classifier
from robustbench_x.errors import ConfigError, SourceError, near_matches

__all__ = ["SOURCE", "encoder_from_timm"]


def encoder_from_timm(
    source: str,
    model: nn.Module,
    *,
    sha256: str | None = None,
    size: int | None = None,
    license: str = "",  # noqa: A002 - the field's name in every model card
    notes: Sequence[str] = (),
) -> LoadedEncoder:
    """A timm model with its weights in place as an encoder, and its classifier apart.

    Args:
        source: As the user wrote it.
        model: Any timm model, at the size its weights were made for; changed in place.
        sha256: Digest of its weight file; the encoder's own digest when None.
        size: Height and width to run at; position embeddings are resampled to it.
        license: As published.
        notes: For the report.

    Raises:
        ConfigError: The architecture does not run at `size`.
    """
    try:
        input_size = _resize(source, model, size)
        classifier, split_notes = split_classifier(model, input_size)
        backbone = TimmBackbone(model, input_size)
    except (AssertionError, RuntimeError, ValueError) as error:
        if size is None:
            raise SourceError(f"{source}: the model does not run ({error})") from error
        raise ConfigError(f"{source}: the model does not run at {size} pixels ({error})") from error
    encoder = Encoder(
        source=source,
        backbone=backbone,
        preprocessing=_preprocessing(source, model, input_size),
        sha256=sha256,
        license=license,
        notes=(*notes, *split_notes),
    )
    return LoadedEncoder(encoder, classifier)


def _load(source: str, rest: str, options: EncoderOptions) -> LoadedEncoder:
    name, at, file = rest.partition("@")
    if at and not file:
        raise ConfigError(f"encoder '{source}': write the checkpoint after '@', as in timm:{name}@weights.safetensors")
    _check_name(source, name)
    path = Path(file).expanduser() if file else _download(source, name)
    checkpoint = read_state(path, source, allow_pickle=options.allow_pickle)
    model, notes = _build(source, name, checkpoint)
    license_name = "" if file else str(timm.get_pretrained_cfg(name).license or "")
    return encoder_from_timm(
        source, model, sha256=file_sha256(path), size=options.size, license=license_name, notes=notes
    )


SOURCE = EncoderSource(
    scheme="timm",
    usage="timm:NAME, timm:NAME@FILE",
    summary="any timm model: published weights from the hub, or a local .safetensors or .pth file",
    load=_load,
)


def _check_name(source: str, name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = near_matches(name, timm.list_models()) or near_matches(name, timm.list_models(pretrained=True))
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise SourceError(f"{source}: timm has no model '{name}'; {hint}timm.list_models() lists them all")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise SourceError(f"{source}: timm knows no weights '{tag}' of {architecture}; it knows {', '.join(tags)}")


def _build(source: str, name: str, checkpoint: Checkpoint) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with as many outputs as the checkpoint has, fully loaded."""
    model: Any = timm.create_model(name, pretrained=False)
    published = model.pretrained_cfg.get("classifier") or ()
    classifiers = (published,) if isinstance(published, str) else tuple(published)
    head = {f"{part}.{kind}" for part in classifiers for kind in ("weight", "bias")}
    body = set(model.state_dict()) - head

    def fits(keys: Collection[str]) -> bool:
        return set(keys) - head == body

    checkpoint = strip_prefix(checkpoint, fits)
    if not fits(checkpoint.state):
        checkpoint = _converted(model, checkpoint, fits)
    notes = checkpoint.notes
    outputs = next((len(t) for key, t in checkpoint.state.items() if key in head and t.ndim > 0), 0)
    if fits(checkpoint.state) and outputs != model.num_classes:
        if outputs == 0:
            notes += ("the checkpoint holds no classifier",)
        model = timm.create_model(name, pretrained=False, num_classes=outputs)
    load_strictly(model, checkpoint.state, source)
    return model, notes


def _converted(model: nn.Module, checkpoint: Checkpoint, fits: Any) -> Checkpoint:
    """The checkpoint after timm's own rule for the files this architecture was published in, where that helps."""
    rule = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rule is None:
        return checkpoint
    try:
        state: dict[str, Tensor] = rule(dict(checkpoint.state), model)
    except (KeyError, IndexError, RuntimeError, ValueError, AttributeError):
        return checkpoint  # not one of those files: the strict load lists what differs
    if not fits(state):
        return checkpoint
    note = "timm's rule for this architecture renamed or dropped keys of the original release"
    return Checkpoint(state, (*checkpoint.notes, note))


def _download(source: str, name: str) -> Path:
    cfg = timm.get_pretrained_cfg(name)
    if not cfg.hf_hub_id and not cfg.url:
        raise SourceError(f"{source}: nobody publishes weights of {name}; load your own with timm:{name}@FILE")
    try:
        return _from_hub(cfg) if cfg.hf_hub_id else _from_url(cfg.url)
    except LocalEntryNotFoundError as error:
        raise SourceError(_offline(source, name)) from error
    except EntryNotFoundError as error:
        raise SourceError(f"{source}: the hub holds no weight file for {name}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = "accept its licence there and log in" if status in (401, 403) else f"HTTP status {status}"
        raise SourceError(f"{source}: the hub refuses the weights of {name}: {reason}") from error
    except urllib.error.HTTPError as error:
        raise SourceError(f"{source}: the server refuses the weights of {name}: HTTP status {error.code}") from error
    except NETWORK_ERRORS as error:
        raise SourceError(_offline(source, name)) from error
    except OSError as error:
        raise SourceError(f"{source}: the weights of {name} could not be stored ({error})") from error


def _from_hub(cfg: Any) -> Path:
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for name in names:
        cached = try_to_load_from_cache(cfg.hf_hub_id, name)
        if isinstance(cached, str):
            return Path(cached)
    if not constants.HF_HUB_OFFLINE and not urllib.request.getproxies():
        # The hub's client would retry a name that does not resolve for half a minute.
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    for name in names[:-1]:
        try:
            return Path(hf_hub_download(cfg.hf_hub_id, name))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(cfg.hf_hub_id, names[-1]))


def _from_url(url: str) -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(urllib.parse.urlsplit(url).path).name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), progress=False)
    return target


def _offline(source: str, name: str) -> str:
    return (
        f"{source} needs a network that is not there; packaged:efficientnet_lite0 and packaged:dinov2_vits14 "
        f"need none, and timm:{name}@FILE loads a checkpoint you have"
    )


def _resize(source: str, model: nn.Module, size: int | None) -> tuple[int, int]:
    patch_embed: Any = getattr(model, "patch_embed", None)
    # Not the data config: that repeats the published size even when the model was built with another.
    native = getattr(patch_embed, "img_size", None) or timm.data.resolve_model_data_config(model)["input_size"][1:]
    height, width = (int(side) for side in native)
    if size is None or (height, width) == (size, size):
        return height, width
    patch = getattr(patch_embed, "patch_size", None)
    if patch:
        step = int(max(patch)) if isinstance(patch, tuple | list) else int(patch)
        if size % step:
            below, above = size // step * step, (size // step + 1) * step
            nearest = f"{below} or {above}" if below else str(above)
            raise ConfigError(f"{source}: size {size} is no multiple of the patch size {step}; use {nearest}")
    if hasattr(model, "set_input_size"):
        net: Any = model
        net.set_input_size(img_size=(size, size))
    return size, size


def _preprocessing(source: str, model: nn.Module, input_size: tuple[int, int]) -> Preprocessing:
    cfg = timm.data.resolve_model_data_config(model)
    if len(cfg["mean"]) != 3:
        raise SourceError(f"{source} reads {len(cfg['mean'])} channels; robustbench_x audits RGB encoders")
    known = ("nearest", "bilinear", "bicubic", "lanczos")
    return Preprocessing(
        input_size=input_size,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"] if cfg["interpolation"] in known else "bicubic",
        crop_pct=float(cfg["crop_pct"]),
        crop_mode="squash" if cfg["crop_mode"] == "squash" else "center",
    )
