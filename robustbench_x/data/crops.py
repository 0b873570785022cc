"""`packaged:crops`: unlabelled crops of photographs that ship inside Python packages, as surrogate images."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image

from robustbench_x.data.dataset import Dataset, Item, read_image
from robustbench_x.errors import DataError, MissingExtraError
from robustbench_x.randomness import derive_seed

__all__ = ["open_crops"]

_EXTRA = "packaged"
_COUNT = 10_000
_SMALLEST = 64
_PHOTOGRAPHS = {
    ("skimage", "scikit-image", "data"): (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    ("sklearn", "scikit-learn", "datasets/images"): ("china.jpg", "flower.jpg"),
}


def open_crops(source: str) -> Dataset:
    """10,000 square crops of eleven photographs, of random side (64 pixels to the whole) and place.

    Crop number i is always the same, and every photograph is as likely as any other. There is no training split and
    one class: these are images to train an attack on, not to audit on.

    Raises:
        MissingExtraError: A package that carries the photographs is not installed.
        DataError: A photograph is missing from its package.
    """
    photographs = [path for owner, names in _PHOTOGRAPHS.items() for path in _files(source, *owner, names)]
    items = tuple(
        Item(id=f"crops/{number:05d}", label=0, load=functools.partial(_crop, tuple(photographs), number))
        for number in range(_COUNT)
    )
    return Dataset(
        source=source,
        classes=("unlabelled",),
        train=(),
        test=items,
        license="photographs of scikit-image (public domain, CC0, or as its data/README says) and scikit-learn (CC BY)",
        notes=(f"{_COUNT} random crops of {len(photographs)} photographs, without labels: a surrogate set",),
    )


def _files(source: str, module: str, package: str, folder: str, names: tuple[str, ...]) -> list[Path]:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(source, package=package, extra=_EXTRA)
    paths = [Path(spec.submodule_search_locations[0]) / folder / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{source}: the installed {package} has no {missing[0]}; run: pip install --force-reinstall {package}"
        )
    return paths


def _crop(photographs: tuple[Path, ...], number: int) -> PIL.Image.Image:
    rng = np.random.default_rng(derive_seed("crops", number))
    image = _photograph(photographs[int(rng.integers(len(photographs)))])
    side = int(rng.integers(_SMALLEST, min(image.size) + 1))
    left, top = int(rng.integers(image.width - side + 1)), int(rng.integers(image.height - side + 1))
    return image.crop((left, top, left + side, top + side))


@functools.cache
def _photograph(path: Path) -> PIL.Image.Image:
    """Decoded once: eleven photographs take some 20 MB."""
    return read_image(path, name=path.name).convert("RGB")
