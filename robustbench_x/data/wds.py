"""`wds:PATTERN`: WebDataset shards, tar files whose neighbouring members of one name make a sample.

The shards are indexed once by their headers; images are read from their place in the tar when asked for, so a set of
any size costs its index. A sample has an image (`jpg`, `jpeg`, `png`, `webp`) and may have a `cls` with its class, a
name or a number. The pattern is a path with `*` and braces: `shards/train-{0000..0009}.tar`.
"""

import functools
import io
import re
import tarfile
from collections.abc import Iterator
from glob import glob
from itertools import product
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from robustbench_x.data.dataset import Dataset, DataSource, Item, read_image, stratified_split
from robustbench_x.errors import DataError

__all__ = ["SOURCE", "expand"]

_IMAGES = ("jpg", "jpeg", "png", "webp")
_LABEL = "cls"
_TEST_SHARE = 0.2
_BLOCK = 512


class _Sample(NamedTuple):
    key: str
    shard: Path
    offset: int
    size: int
    label: str | None


def _open(source: str, rest: str, seed: int) -> Dataset:
    samples = [sample for shard in _shards(source, rest) for sample in _read(shard)]
    if not samples:
        raise DataError(f"data '{source}': its shards hold no image ({', '.join(_IMAGES)})")
    labelled = [sample.label is not None for sample in samples]
    if any(labelled) and not all(labelled):
        bare = samples[labelled.index(False)]
        raise DataError(f"data '{source}': {bare.shard}: {bare.key} has no .{_LABEL}, though other samples have one")
    names = sorted({sample.label or "unlabelled" for sample in samples}, key=_natural)
    index = {name: number for number, name in enumerate(names)}
    items = tuple(
        Item(
            id=f"{sample.shard.name}/{sample.key}",
            label=index[sample.label or "unlabelled"],
            load=functools.partial(_load, sample),
            file=sample.shard,
        )
        for sample in samples
    )
    if not all(labelled):
        note = "no labels: a surrogate set; nothing can be audited on it"
        return Dataset(source=source, classes=tuple(names), train=(), test=items, notes=(note,))
    train, test = stratified_split(items, test_share=_TEST_SHARE, seed=seed)
    note = f"{_TEST_SHARE:.0%} of every class is held out by the seed {seed}"
    return Dataset(source=source, classes=tuple(names), train=train, test=test, notes=(note,))


SOURCE = DataSource(
    scheme="wds",
    usage="wds:shards/train-{0000..0009}.tar",
    summary="WebDataset shards: images with or without .cls labels, read in place from tar files",
    open=_open,
)


def expand(pattern: str) -> list[str]:
    """`pattern` with `{a,b}` and `{000..012}` written out, in order.

    >>> expand("s-{08..10}.tar")
    ['s-08.tar', 's-09.tar', 's-10.tar']
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[piece] if number % 2 == 0 else list(_choices(piece)) for number, piece in enumerate(pieces)]
    return ["".join(parts) for parts in product(*choices)]


def _choices(text: str) -> Iterator[str]:
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if counted is None:
        yield from text.split(",")
        return
    first, last = counted.groups()
    if int(first) > int(last):
        raise DataError(f"shards {{{text}}}: the range runs backwards")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    for number in range(int(first), int(last) + 1):
        yield f"{number:0{width}d}"


def _shards(source: str, rest: str) -> list[Path]:
    if not rest:
        raise DataError(f"data '{source}' names no shards; write wds:shards/train-{{0000..0009}}.tar")
    shards = []
    for name in expand(str(Path(rest).expanduser())):
        found = sorted(glob(name)) if any(sign in name for sign in "*?[") else [name]
        if not found or not Path(found[0]).is_file():
            raise DataError(f"data '{source}': there is no shard {name}")
        shards += [Path(path).absolute() for path in found]
    return shards


def _read(shard: Path) -> list[_Sample]:
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, suffix = _split(member.name)
                if not member.isfile() or suffix not in (*_IMAGES, _LABEL):
                    continue
                if key in (labels if suffix == _LABEL else images):
                    raise DataError(f"{shard}: the sample {key} has two files .{suffix} or two images")
                if suffix == _LABEL:
                    content = tar.extractfile(member)
                    assert content is not None, "a regular member has content"
                    labels[key] = content.read().decode("utf-8", errors="strict").strip()
                    if not labels[key]:
                        raise DataError(f"{shard}: the .{_LABEL} of {key} is empty")
                else:
                    images[key] = (member.offset_data, member.size)
            end = tar.offset
        # tarfile takes a damaged header for the end; a tar that was written whole ends in blocks of zeros.
        with shard.open("rb") as file:
            file.seek(end)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise DataError(f"{shard} is damaged or cut short behind its first {len(images)} images")
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shard} cannot be read as an uncompressed tar: {error}") from error
    return [_Sample(key, shard, offset, size, labels.get(key)) for key, (offset, size) in images.items()]


def _split(name: str) -> tuple[str, str, str]:
    """Key and suffix, which begins at the first dot of the file's own name."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", dot, suffix.lower()


def _natural(text: str) -> tuple[int, int, str]:
    return (0, int(text), text) if text.isdecimal() else (1, 0, text)


def _load(sample: _Sample) -> PIL.Image.Image:
    name = f"{sample.shard}:{sample.key}"
    try:
        with sample.shard.open("rb") as file:
            file.seek(sample.offset)
            content = file.read(sample.size)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error
    return read_image(io.BytesIO(content), name=name)
