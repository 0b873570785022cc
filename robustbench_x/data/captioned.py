"""`captions:FILE.json`: images with the sentences that describe them, in the layouts that benchmarks come in."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustbench_x.data.dataset import Dataset, DataSource, Item, read_image
from robustbench_x.errors import DataError

__all__ = ["SOURCE"]


def _open(source: str, rest: str, _seed: int) -> Dataset:
    path = Path(rest).expanduser().absolute()
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: {path} cannot be read as JSON: {error}") from error
    captions = _coco(found, path) if isinstance(found, dict) else _entries(found, path)
    items = []
    for index, (name, texts) in enumerate(captions.items()):
        file = path.parent / name
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{path}: the image {name} has no caption, or one that is no text")
        if not file.is_file():
            raise DataError(f"{path}: the image {name} is not there; image paths are read from {path.parent}")
        items.append(
            Item(
                id=name,
                label=index,
                load=functools.partial(read_image, file, name=str(file)),
                captions=tuple(text.strip() for text in texts),
            )
        )
    return Dataset(source=source, classes=tuple(captions), train=(), test=tuple(items))


def _entries(found: object, path: Path) -> dict[str, list[Any]]:
    """`[{"image": path, "caption": text or texts}, ...]`; an image may come several times."""
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of images, or COCO's images and annotations")
    captions: dict[str, list[Any]] = {}
    for number, entry in enumerate(found):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("image"), str) or "caption" not in entry:
            raise DataError(f"{path}: entry {number} has not the keys image and caption")
        texts = entry["caption"]
        captions.setdefault(entry["image"], []).extend([texts] if isinstance(texts, str) else list(texts))
    return captions


def _coco(found: Mapping[str, Any], path: Path) -> dict[str, list[Any]]:
    """`{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`."""
    try:
        names = {entry["id"]: str(entry["file_name"]) for entry in found["images"]}
        captions: dict[str, list[Any]] = {name: [] for name in names.values()}
        for entry in found["annotations"]:
            captions[names[entry["image_id"]]].append(entry["caption"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not in COCO's layout: {error!r} is missing or malformed") from error
    return captions


SOURCE = DataSource(
    scheme="captions",
    usage="captions:FILE.json",
    summary="images with captions: a list of image and caption, or COCO's annotations; paths from the file's folder",
    open=_open,
)
