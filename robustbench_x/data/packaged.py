"""`packaged:digits` and `packaged:photos`: labelled images that ship inside Python packages, so no download."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image

from robustbench_x.data.crops import open_crops
from robustbench_x.data.dataset import Dataset, DataSource, Item, read_image
from robustbench_x.errors import DataError, MissingExtraError, UnknownNameError

__all__ = ["SOURCE"]

_EXTRA = "packaged"
_TRAIN_PER_DIGIT = 100


def _open(source: str, rest: str, _seed: int) -> Dataset:
    if rest not in _OPENERS:
        raise UnknownNameError("packaged data set", rest, _OPENERS)
    return _OPENERS[rest](source)


def _digits(source: str) -> Dataset:
    """1,797 scans: the first 100 of every digit, in file order, are for training and the other 797 for testing.

    The split does not depend on a seed, so results of different audits are on the same images. File order
    follows the writers, so most test scans are of hands that the head has not seen.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError(source, package="scikit-learn", extra=_EXTRA) from None
    scans = load_digits()
    levels = np.rint(scans.images * (255 / 16)).astype(np.uint8)
    train: list[Item] = []
    test: list[Item] = []
    seen = [0] * 10
    for index, (image, digit) in enumerate(zip(levels, scans.target.tolist(), strict=True)):
        split = train if seen[digit] < _TRAIN_PER_DIGIT else test
        seen[digit] += 1
        load = functools.partial(_grey, image.tobytes())
        split.append(Item(id=f"digits/{index:04d}", label=digit, load=load))
    return Dataset(
        source=source,
        classes=tuple("0123456789"),
        train=tuple(train),
        test=tuple(test),
        license="CC BY 4.0 (UCI Optical Recognition of Handwritten Digits, through scikit-learn)",
        notes=("8x8 scans, enlarged by the encoder's own preprocessing; the split is fixed and ignores the seed",),
    )


def _grey(levels: bytes) -> PIL.Image.Image:
    return PIL.Image.frombytes("L", (8, 8), levels).convert("RGB")


def _photos(source: str) -> Dataset:
    """20 ImageNet photographs, `imagenet_NN_LABEL.jpg` with LABEL the class index; there is nothing to train on."""
    spec = importlib.util.find_spec("foolbox")  # importing it would pull in eagerpy and its frameworks
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(source, package="foolbox", extra=_EXTRA)
    folder = Path(spec.submodule_search_locations[0]) / "data"
    files = sorted(folder.glob("imagenet_*_*.jpg"))
    if not files:
        raise DataError(
            f"{source}: the installed foolbox has no photographs; run: pip install --force-reinstall foolbox"
        )
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    synsets = [info.index_to_label_name(int(file.stem.rpartition("_")[2])) for file in files]
    classes = tuple(sorted(set(synsets)))
    words = {synset: info.label_name_to_description(synset).split(",")[0] for synset in classes}
    return Dataset(
        source=source,
        classes=classes,
        names=tuple(words[synset] for synset in classes),
        train=(),
        test=tuple(
            Item(
                id=file.name,
                label=classes.index(synset),
                load=functools.partial(read_image, file, name=f"{source} {file.name}"),
                captions=(f"a photo of a {words[synset]}",),
            )
            for file, synset in zip(files, synsets, strict=True)
        ),
        license="foolbox is MIT; the photographs are ImageNet's, under its terms of non-commercial research use",
        notes=(
            f"only {len(files)} photographs: intervals are wide, and there is no training split",
            "a caption of each is made from its class's name: nobody wrote one",
        ),
    )


_OPENERS = {"digits": _digits, "photos": _photos, "crops": open_crops}

SOURCE = DataSource(
    scheme="packaged",
    usage="packaged:digits",
    summary="images that ship inside Python packages, offline; crops are unlabelled, a surrogate set",
    open=_open,
    names=tuple(_OPENERS),
)
