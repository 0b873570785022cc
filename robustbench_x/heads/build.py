"""From a head's name to a head ready to judge: read, wrapped, fitted, or tuned on the training split."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from robustbench_x import cache
from robustbench_x.data.dataset import Dataset, Item
from robustbench_x.encoders.encoder import Encoder, LoadedEncoder
from robustbench_x.errors import ConfigError, DataError, SampleError, SourceError
from robustbench_x.heads.base import FittedHead, HeadSpec
from robustbench_x.heads.features import Features, content_digest, features_of
from robustbench_x.heads.reader import READERS, build_reader_head
from robustbench_x.heads.saved import read_head, save_head
from robustbench_x.heads.text import build_captions, build_zero_shot
from robustbench_x.heads.tuning.recipe import Tell
from robustbench_x.heads.tuning.supply import supply_tuned
from robustbench_x.imagetext.victims import load_reader

if TYPE_CHECKING:
    from robustbench_x.registry import Registry

__all__ = ["Features", "build_head", "features_of", "save_head"]

_PART = 256
_READERS = tuple(spec.name for spec in READERS)
_SHOWN = 5


def build_head(
    name: str,
    *,
    loaded: LoadedEncoder,
    dataset: Dataset,
    registry: "Registry",
    seed: int,
    device: torch.device,
    batch_size: int,
    gallery: Sequence[Item] = (),
    allow_pickle: bool = False,
    progress: Tell | None = None,
) -> FittedHead:
    """The head called `name` for one encoder and one data set, on `device`.

    Args:
        name: `native`, `file:PATH`, or a kind of head that is fitted, or tuned with a copy of the encoder, on
            `dataset.train`.
        loaded: The encoder, on `device`, and its published classifier; left alone.
        dataset: What is fitted on, and whose class names the fitted head knows.
        registry: Where kinds of heads are looked up.
        seed: Decides what a fit draws.
        device: Where features are computed and the head ends up.
        batch_size: Images per forward pass.
        gallery: The evaluated images of all shards, whose captions head `captions` ranks.
        allow_pickle: Lets the weights of a vision-language model run code while they load.
        progress: Told in a few words about training images encoded and epochs trained.

    Raises:
        ConfigError: The name is malformed.
        UnknownNameError: There is no such kind of head.
        MissingExtraError: It is tuned with a package that is not installed.
        SourceError: The encoder has no classifier of its own or cannot be tuned, or the file does not fit.
        DataError: There is no training image, or a class has none.
        SampleError: The fit did not converge.
    """
    kind, colon, path = name.partition(":")
    spec = registry.heads[kind]
    if (kind == "file" or kind in _READERS) != bool(path) or (colon and not path):
        raise ConfigError(
            f"head '{name}': only file takes a path, and {', '.join(_READERS)} a source, and they need one: "
            "file:HEAD.safetensors, caption:hf:ORG/NAME"
        )
    if kind == "native":
        return _native(loaded).to(device)
    if kind == "zero_shot":
        return build_zero_shot(loaded, dataset).to(device)
    if kind == "captions":
        return build_captions(loaded, gallery).to(device)
    if kind in _READERS:
        return build_reader_head(
            name, loaded=loaded, gallery=gallery, load=functools.partial(load_reader, allow_pickle=allow_pickle)
        ).to(device)
    if kind == "file":
        return read_head(Path(path), name=name, encoder=loaded.encoder, registry=registry).to(device)
    if not dataset.train:
        raise DataError(
            f"head {name} needs training images, but {dataset.source} has none; use head native or file:HEAD"
        )
    if spec.tune is not None:
        spec.tune.require()  # before anything is encoded
    tell = progress or _silent
    found = features_of(
        loaded.encoder,
        dataset.train,
        batch_size=batch_size,
        device=device,
        progress=lambda done, total: tell(f"{done} of {total} images"),
        keep_pixels=spec.tune is not None,
    )
    if not len(found.labels):
        raise DataError(f"{dataset.source}: none of {len(dataset.train)} training images is readable: {_first(found)}")
    try:
        made = _made(spec, found, loaded.encoder, len(dataset.classes), seed, device, batch_size, tell)
    except (DataError, SampleError) as error:
        raise type(error)(f"head {name} on {dataset.source}: {error}") from error
    return FittedHead(
        name=name,
        layer=made.layer,
        num_classes=len(dataset.classes),
        aliases={label: index for index, label in enumerate(dataset.classes)},
        settings={
            **made.settings,
            "kind": spec.name,
            "seed": seed,
            "feature_dim": loaded.encoder.feature_dim,
            "train_samples": len(found.labels),
            "data": dataset.source,
            "encoder": loaded.encoder.source,
            "encoder_sha256": loaded.encoder.sha256,
            "unreadable": len(found.unreadable),
            "unreadable_first": list(found.unreadable[:_SHOWN]),
        },
        task=spec.task,
        encoder=made.encoder,
        changed=made.changed,
    ).to(device)


class _Made(NamedTuple):
    """What a head is made of, and how it came about."""

    layer: nn.Module
    settings: dict[str, Any]
    encoder: Encoder | None = None
    changed: tuple[str, ...] = ()


def _made(
    spec: HeadSpec,
    found: Features,
    encoder: Encoder,
    num_classes: int,
    seed: int,
    device: torch.device,
    batch_size: int,
    tell: Tell,
) -> _Made:
    if spec.tune is None:
        return _fitted(spec, found, num_classes=num_classes, seed=seed, device=device)
    victim = supply_tuned(
        spec.tune,
        encoder,
        found,
        num_classes=num_classes,
        seed=seed,
        device=device,
        batch_size=batch_size,
        tell=tell,
    )
    return _Made(victim.layer, victim.settings, victim.encoder, victim.changed)


def _native(loaded: LoadedEncoder) -> FittedHead:
    if loaded.classifier is None:
        raise SourceError(
            f"{loaded.encoder.source} publishes no classifier, so there is no native head; use head linear instead"
        )
    classifier = loaded.classifier
    aliases = classifier.aliases or {str(index): index for index in range(classifier.num_classes)}
    return FittedHead(name="native", layer=classifier, num_classes=classifier.num_classes, aliases=aliases)


def _fitted(spec: HeadSpec, found: Features, *, num_classes: int, seed: int, device: torch.device) -> _Made:
    """The layer, fitted now or earlier, and how."""
    if spec.fit is None:
        raise SourceError(f"head {spec.name} has nothing to fit; `rbx list heads` prints those that do")
    settings = dict(spec.settings or {})
    key = "head-" + content_digest(
        spec.name, json.dumps(settings, sort_keys=True), seed, num_classes, tuple(found.features.shape), *found[:2]
    )
    settings["cache_key"] = key
    stored = cache.load(key) if spec.restore else None
    if stored and spec.restore:
        accuracy = float(stored.metadata["train_accuracy"])
        return _Made(spec.restore(stored.tensors), {**settings, "train_accuracy": accuracy})
    # Only CUDA: other accelerators lack the float64 that a converged fit needs.
    place = device if device.type == "cuda" else torch.device("cpu")
    features, labels = found.features.to(place), found.labels.to(place)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)  # for a plugin's fit that knows only the global generator
        layer = spec.fit(features, labels, num_classes, seed).eval()
    accuracy = _accuracy(layer, features, labels)
    if spec.restore:
        cache.save(key, layer.state_dict(), {"train_accuracy": repr(accuracy)})
    return _Made(layer, {**settings, "train_accuracy": accuracy})


@torch.no_grad()
def _accuracy(layer: nn.Module, features: Tensor, labels: Tensor) -> float:
    hits = [
        (layer(part).argmax(dim=1) == truth).sum()
        for part, truth in zip(torch.split(features, _PART), torch.split(labels, _PART), strict=True)
    ]
    return int(torch.stack(hits).sum()) / len(labels)


def _first(found: Features) -> str:
    return "; ".join(found.unreadable[:_SHOWN])


def _silent(text: str) -> None:
    """Tells nobody."""
