"""A data set: labelled images that are decoded only when asked for."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageOps

from robustbench_x.errors import ConfigError, DataError, NothingEvaluatedError
from robustbench_x.randomness import derive_seed

if TYPE_CHECKING:
    from robustbench_x.registry import Registry

__all__ = ["DataSource", "Dataset", "Item", "draw_subset", "open_dataset", "read_image", "stratified_split"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One labelled image.

    `id` is unique in its data set and the same on every machine; `label` indexes `Dataset.classes`;
    `load` decodes it and raises `DataError` naming the file when it cannot; `captions` say what it shows. `file` is
    where it is read from, alone or with others in a shard; None for an image that lies in no file of its own.
    """

    id: str
    label: int
    load: Callable[[], PIL.Image.Image] = field(repr=False, compare=False)
    captions: tuple[str, ...] = ()
    file: Path | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images with labels: heads are fitted on `train`, attacks are judged on `test`.

    `train` is empty where a source has only an evaluation split. `license` and `notes` go into the report. `names` are
    words for the classes, where `classes` holds ids.
    """

    source: str
    classes: tuple[str, ...]
    train: tuple[Item, ...]
    test: tuple[Item, ...]
    license: str = ""
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """A readable name of every class."""
        return self.names or self.classes


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A scheme that data sets are opened by; `open` takes the source as written, its middle part, and the seed."""

    scheme: str
    usage: str
    summary: str
    open: Callable[[str, str, int], Dataset]
    names: tuple[str, ...] = ()


def open_dataset(source: str, registry: "Registry", *, seed: int = 0) -> Dataset:
    """The data set that `source` names; `seed` decides a split where the source has none.

    Everything after the first colon belongs to the scheme, so a folder or a pattern may hold a `?`.

    Raises:
        ConfigError: `source` has no scheme, or an option of it is wrong.
        UnknownNameError: No such scheme or name.
        DataError: Files are missing, are no images, or no class holds any; or ids repeat.
        NothingEvaluatedError: The evaluation split is empty.
    """
    scheme, colon, rest = source.partition(":")
    if not colon or not scheme:
        meant = f"folder:{source}" if source and Path(source).is_dir() else "scheme:name, for example packaged:photos"
        raise ConfigError(f"data '{source}' has no scheme; write {meant}")
    dataset = registry.data[scheme].open(source, rest, seed)
    if not dataset.test:
        raise NothingEvaluatedError(f"{source} holds no image to evaluate")
    ids = Counter(item.id for item in (*dataset.train, *dataset.test))
    if len(ids) < len(dataset.train) + len(dataset.test):
        name, times = ids.most_common(1)[0]
        raise DataError(
            f"{source}: the image id '{name}' occurs {times} times; results are stored by id, so rename them"
        )
    return dataset


def draw_subset(items: Sequence[Item], count: int | None, *, seed: int) -> tuple[Item, ...]:
    """A seeded stratified subset of `count` items, in the pool's order: classes keep their shares.

    A larger `count` with the same seed keeps every item of a smaller one, so a longer audit extends a
    shorter one. Every item is about equally likely to be drawn, whatever the size of its class.

    Raises:
        ConfigError: `count` is not positive.
    """
    if count is not None and count < 1:
        raise ConfigError(f"cannot draw {count} samples; ask for 1 or more")
    if count is None or count >= len(items):
        return tuple(items)
    rng = np.random.default_rng(derive_seed("draw_subset", seed))
    labels = np.array([item.label for item in items])
    keys = np.empty(len(items))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # One item of the class in each of `len(members)` equal intervals, at a random place in it: with fixed
        # places, classes of one image would all come in together, in the middle.
        keys[members] = (rng.permutation(len(members)) + rng.random(len(members))) / len(members)
    chosen = np.argsort(keys, kind="stable")[:count]
    return tuple(items[i] for i in np.sort(chosen))


def stratified_split(
    items: Sequence[Item], *, test_share: float, seed: int
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """`(train, test)`: of every class, `test_share` of its items go to test, but at least one to either.

    Raises:
        DataError: A class has a single item, which cannot serve both splits.
    """
    rng = np.random.default_rng(derive_seed("stratified_split", seed))
    labels = np.array([item.label for item in items])
    in_test = np.zeros(len(items), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"a split needs two images of every class, but the class of {items[members[0]].id} has no other; "
                "add images or remove the class"
            )
        count = min(max(1, round(test_share * len(members))), len(members) - 1)
        in_test[rng.permutation(members)[:count]] = True
    train = tuple(item for item, test in zip(items, in_test, strict=True) if not test)
    return train, tuple(item for item, test in zip(items, in_test, strict=True) if test)


def read_image(file: Path | IO[bytes], *, name: str) -> PIL.Image.Image:
    """The picture in `file`, decoded completely and turned upright by its EXIF tag; of a film the first frame.

    16-bit grey becomes 8-bit by its high byte, which `convert("RGB")` would clip to white.

    Raises:
        DataError: It is missing, damaged, truncated, suspiciously large or has pixels without a fixed range;
            names `name` and the reason.
    """
    try:
        with PIL.Image.open(file) as opened:
            opened.load()
            image = PIL.ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    except Exception as error:  # on damaged files, PIL's decoders raise whatever their parsing runs into
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise DataError(f"{name} cannot be read as an image: {reason}") from error
    if image.mode in ("I", "F"):
        raise DataError(
            f"{name} holds {image.mode}-mode pixels, whose range is unknown; convert it to 8 bits a channel"
        )
    return image
