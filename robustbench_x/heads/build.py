"""From a head's name to a head ready to judge: read, wrapped, or fitted on the training split's features."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from robustbench_x import cache
from robustbench_x.data.dataset import Dataset, Item
from robustbench_x.encoders.encoder import Encoder, LoadedEncoder
from robustbench_x.errors import ConfigError, DataError, SourceError
from robustbench_x.heads.base import FittedHead, HeadSpec
from robustbench_x.heads.saved import read_head, save_head

if TYPE_CHECKING:
    from robustbench_x.registry import Registry

__all__ = ["Features", "build_head", "features_of", "save_head"]

_CHUNK = 256
_SHOWN = 5

Advance = Callable[[int, int], None]
"""Told how many images of how many are done."""


class Features(NamedTuple):
    """What an encoder makes of labelled images."""

    features: Tensor
    """`(N, D)` float32 on the CPU."""
    labels: Tensor
    """`(N,)` int64, in the order of the readable items."""
    unreadable: tuple[str, ...]
    """Why each item that could not be decoded could not be; those have no row above."""


def build_head(
    name: str,
    *,
    loaded: LoadedEncoder,
    dataset: Dataset,
    registry: "Registry",
    seed: int,
    device: torch.device,
    batch_size: int,
    progress: Advance | None = None,
) -> FittedHead:
    """The head called `name` for one encoder and one data set, on `device`.

    Args:
        name: `native`, `file:PATH`, or a kind of head that is fitted on `dataset.train`.
        loaded: The encoder, on `device`, and its published classifier.
        dataset: What is fitted on, and whose class names the fitted head knows.
        registry: Where kinds of heads are looked up.
        seed: Decides what a fit draws.
        device: Where features are computed and the head ends up.
        batch_size: Images per forward pass.
        progress: Told about training images encoded.

    Raises:
        ConfigError: The name is malformed.
        UnknownNameError: There is no such kind of head.
        SourceError: The encoder has no classifier of its own, or the file does not fit.
        DataError: There is no training image, or a class has none.
        SampleError: The fit did not converge.
    """
    kind, colon, path = name.partition(":")
    spec = registry.heads[kind]
    if (kind == "file") != bool(path) or (colon and not path):
        raise ConfigError(f"head '{name}': only file takes a path, and it needs one: file:HEAD.safetensors")
    if kind == "native":
        return _native(loaded).to(device)
    if kind == "file":
        return read_head(Path(path), name=name, encoder=loaded.encoder, registry=registry).to(device)
    if not dataset.train:
        raise DataError(
            f"head {name} needs training images, but {dataset.source} has none; use head native or file:HEAD"
        )
    found = features_of(loaded.encoder, dataset.train, batch_size=batch_size, device=device, progress=progress)
    if not len(found.labels):
        raise DataError(f"{dataset.source}: none of {len(dataset.train)} training images is readable: {_first(found)}")
    try:
        layer, made = _fitted(spec, found, num_classes=len(dataset.classes), seed=seed, device=device)
    except DataError as error:
        raise DataError(f"head {name} on {dataset.source}: {error}") from error
    return FittedHead(
        name=name,
        layer=layer,
        num_classes=len(dataset.classes),
        aliases={label: index for index, label in enumerate(dataset.classes)},
        settings={
            **made,
            "data": dataset.source,
            "encoder": loaded.encoder.source,
            "encoder_sha256": loaded.encoder.sha256,
            "unreadable": len(found.unreadable),
            "unreadable_first": list(found.unreadable[:_SHOWN]),
        },
        task=spec.task,
    ).to(device)


@torch.no_grad()
def features_of(
    encoder: Encoder,
    items: Sequence[Item],
    *,
    batch_size: int,
    device: torch.device,
    progress: Advance | None = None,
) -> Features:
    """Features of `items`, in their order, cached on disk by content.

    The cache knows the decoded pixels, the weights' digest and what the encoder answers to two random images,
    so neither a changed picture nor a `python:` encoder with changed code meets an old entry. Pixels are held
    for 256 images at a time, whatever the data set's size, and an interrupted run resumes there.

    Args:
        encoder: In eval mode, on `device`.
        items: What to encode; one whose `load` raises `DataError` is named in `unreadable`.
        batch_size: Images per forward pass.
        device: Where the encoder is.
        progress: Told after every 256 items.
    """
    fingerprint = _fingerprint(encoder, device)
    features, labels, unreadable = [torch.empty(0, encoder.feature_dim)], [], []
    for start in range(0, len(items), _CHUNK):
        levels = []
        for item in items[start : start + _CHUNK]:
            try:
                pixels = encoder.preprocessing(item.load())
            except DataError as error:
                unreadable.append(str(error))
                continue
            levels.append(pixels.mul(255).round().to(torch.uint8))
            labels.append(item.label)
        if levels:
            features.append(_encode(encoder, torch.stack(levels), fingerprint, batch_size, device))
        if progress:
            progress(min(start + _CHUNK, len(items)), len(items))
    return Features(torch.cat(features), torch.tensor(labels, dtype=torch.long), tuple(unreadable))


def _encode(encoder: Encoder, levels: Tensor, fingerprint: str, batch_size: int, device: torch.device) -> Tensor:
    key = "features-" + _sha256(encoder.sha256, fingerprint, tuple(levels.shape), levels)
    stored = cache.load(key)
    if stored:
        return stored.tensors["features"]
    parts = [encoder(part.to(device).float().div(255)).cpu() for part in torch.split(levels, batch_size)]
    features = torch.cat(parts)
    cache.save(key, {"features": features})
    return features


def _fingerprint(encoder: Encoder, device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *encoder.input_size, generator=generator)
    return _sha256(encoder(images.to(device)).cpu())


def _native(loaded: LoadedEncoder) -> FittedHead:
    if loaded.classifier is None:
        raise SourceError(
            f"{loaded.encoder.source} publishes no classifier, so there is no native head; use head linear instead"
        )
    classifier = loaded.classifier
    aliases = classifier.aliases or {str(index): index for index in range(classifier.num_classes)}
    return FittedHead(name="native", layer=classifier, num_classes=classifier.num_classes, aliases=aliases)


def _fitted(
    spec: HeadSpec, found: Features, *, num_classes: int, seed: int, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The layer, fitted now or earlier, and how it was made."""
    if spec.fit is None:
        raise SourceError(f"head {spec.name} has nothing to fit; `rbx list heads` prints those that do")
    settings = dict(spec.settings or {})
    key = "head-" + _sha256(
        spec.name, json.dumps(settings, sort_keys=True), seed, num_classes, tuple(found.features.shape), *found[:2]
    )
    made = {
        **settings,
        "kind": spec.name,
        "seed": seed,
        "feature_dim": found.features.shape[1],
        "train_samples": len(found.labels),
        "cache_key": key,
    }
    stored = cache.load(key) if spec.restore else None
    if stored and spec.restore:
        return spec.restore(stored.tensors), {**made, "train_accuracy": float(stored.metadata["train_accuracy"])}
    # Only CUDA: other accelerators lack the float64 that a converged fit needs.
    place = device if device.type == "cuda" else torch.device("cpu")
    features, labels = found.features.to(place), found.labels.to(place)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)  # for a plugin's fit that knows only the global generator
        layer = spec.fit(features, labels, num_classes, seed).eval()
    accuracy = _accuracy(layer, features, labels)
    if spec.restore:
        cache.save(key, layer.state_dict(), {"train_accuracy": repr(accuracy)})
    return layer, {**made, "train_accuracy": accuracy}


@torch.no_grad()
def _accuracy(layer: nn.Module, features: Tensor, labels: Tensor) -> float:
    hits = [
        (layer(part).argmax(dim=1) == truth).sum()
        for part, truth in zip(torch.split(features, _CHUNK), torch.split(labels, _CHUNK), strict=True)
    ]
    return int(torch.stack(hits).sum()) / len(labels)


def _first(found: Features) -> str:
    return "; ".join(found.unreadable[:_SHOWN])


def _sha256(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.contiguous().numpy().tobytes() if isinstance(part, Tensor) else str(part).encode()
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
