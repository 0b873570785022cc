"""Fashion-MNIST as a `folder:` data set, from the files that Debian's package dataset-fashion-mnist installs."""

import gzip
from pathlib import Path

import numpy as np
import PIL.Image

PLACE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def write_folder(out: Path, *, place: Path = PLACE, train: int = 1000, test: int = 1000) -> Path:
    """Writes the first `train` and `test` images as PNGs, once; returns `out`."""
    if not place.is_dir():
        raise SystemExit(f"{place} is missing; run: apt-get install dataset-fashion-mnist")
    for split, stem, count in (("train", "train", train), ("test", "t10k", test)):
        if (out / split).is_dir():
            continue
        images = _read(place / f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:count]
        labels = _read(place / f"{stem}-labels-idx1-ubyte.gz", 8)[:count]
        partial = out / f"{split}.partial"
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = partial / CLASSES[int(label)]
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).save(folder / f"{number:05d}.png")
        partial.rename(out / split)
    return out


def _read(path: Path, offset: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=offset)
