"""A data set: labelled images that are decoded only when asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from robustbench_x.encoders.source import split_source
from robustbench_x.errors import DataError, NothingEvaluatedError

if TYPE_CHECKING:
    from robustbench_x.registry import Registry

__all__ = ["DataSource", "Dataset", "Item", "draw_subset", "open_dataset", "stratified_split"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One labelled image.

    `id` is unique in its data set and the same on every machine; `label` indexes `Dataset.classes`;
    `load` decodes it and raises `DataError` naming the file when it cannot.
    """

    id: str
    label: int
    load: Callable[[], PIL.Image.Image] = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images with labels: heads are fitted on `train`, attacks are judged on `test`.

    `train` is empty where a source has only an evaluation split. `license` and `notes` go into the report.
    """

    source: str
    classes: tuple[str, ...]
    train: tuple[Item, ...]
    test: tuple[Item, ...]
    license: str = ""
    notes: tuple[str, ...] = ()


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

    Raises:
        UnknownNameError: No such scheme or name.
        DataError: Files are missing, are no images, or no class holds any.
        NothingEvaluatedError: The evaluation split is empty.
    """
    scheme, rest, options = split_source(source, kind="data")
    if options:
        raise DataError(f"data '{source}': unknown option {', '.join(options)}; data sources take none after '?'")
    dataset = registry.data[scheme].open(source, rest, seed)
    if not dataset.test:
        raise NothingEvaluatedError(f"{source} holds no image to evaluate")
    return dataset


def draw_subset(items: Sequence[Item], count: int | None, *, seed: int) -> tuple[Item, ...]:
    """A seeded stratified subset of `count` items, in the pool's order: classes keep their shares.

    A larger `count` with the same seed keeps every item of a smaller one, so a longer audit extends a
    shorter one.
    """
    if count is None or count >= len(items):
        return tuple(items)
    rng = np.random.default_rng(seed)
    keys = np.empty((len(items), 2))
    labels = np.array([item.label for item in items])
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        keys[members, 0] = (rng.permutation(len(members)) + 0.5) / len(members)
    keys[:, 1] = rng.random(len(items))
    chosen = np.lexsort((keys[:, 1], keys[:, 0]))[:count]
    return tuple(items[i] for i in np.sort(chosen))


def stratified_split(
    items: Sequence[Item], *, test_share: float, seed: int
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """`(train, test)`: of every class, `test_share` of its items (at least one) go to test.

    Raises:
        DataError: A class has a single item, which cannot serve both splits.
    """
    rng = np.random.default_rng(seed)
    labels = np.array([item.label for item in items])
    in_test = np.zeros(len(items), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(f"a split needs two images of every class, but one class has only {items[members[0]].id}")
        in_test[rng.permutation(members)[: max(1, round(test_share * len(members)))]] = True
    train = tuple(item for item, test in zip(items, in_test, strict=True) if not test)
    return train, tuple(item for item, test in zip(items, in_test, strict=True) if test)
