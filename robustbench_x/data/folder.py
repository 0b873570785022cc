"""`folder:DIR`: images in one folder per class (ImageFolder layout), decoded only when asked for."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import PIL.Image

from robustbench_x.data.dataset import Dataset, DataSource, Item, read_image, stratified_split
from robustbench_x.errors import DataError, near_matches

__all__ = ["SOURCE", "existing_folder", "image_files", "read_file"]

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"})
_IGNORED = frozenset({"thumbs.db", "desktop.ini"})
_SPLITS = frozenset({"train", "test", "val"})
_TEST_SHARE = 0.2


def _open(source: str, rest: str, seed: int) -> Dataset:
    root = existing_folder(source, rest)
    folders = {entry.name for entry in _entries(root) if entry.is_dir()}
    evaluation = next((name for name in ("test", "val") if name in folders), None)
    notes: tuple[str, ...] = ()
    if "train" in folders and evaluation:
        classes, train = _read(root, root / "train")
        _, test = _read(root, root / evaluation, classes)
        if evaluation == "test" and "val" in folders:
            notes = ("val/ was left out: heads are fitted on train/ and attacked on test/",)
    elif evaluation and folders <= _SPLITS:
        classes, test = _read(root, root / evaluation)
        train = ()
        notes = (f"only {evaluation}/ is there, so heads that must be fitted cannot be audited on it",)
    elif folders == {"train"}:
        raise DataError(
            f"{root} has train/ but neither test/ nor val/ to attack; add one, "
            f"or write folder:{root / 'train'} to have {_TEST_SHARE:.0%} of it held out"
        )
    else:
        classes, items = _read(root, root)
        train, test = stratified_split(items, test_share=_TEST_SHARE, seed=seed)
        notes = (f"no train/ and test/ inside: {_TEST_SHARE:.0%} of every class is held out by the seed {seed}",)
    return Dataset(source=source, classes=classes, train=train, test=test, notes=notes)


SOURCE = DataSource(
    scheme="folder",
    usage="folder:DIR",
    summary="images in one folder per class, with train/ and test/ or val/ above them, or split by the seed",
    open=_open,
)


def existing_folder(source: str, rest: str) -> Path:
    """The folder that a source names.

    Raises:
        DataError: It names none, or there is no such folder; lists near matches.
    """
    if not rest:
        raise DataError(f"data '{source}' names no folder; write folder:DIR")
    root = Path(rest).expanduser().absolute()  # workers may run in another folder
    if root.is_dir():
        return root
    if root.exists():
        raise DataError(f"{root} is a file; name the folder that holds one folder of images per class")
    siblings = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
    near = near_matches(root.name, siblings)
    hint = f"did you mean {' or '.join(str(root.parent / name) for name in near)}?" if near else "check the path"
    raise DataError(f"there is no folder {root}; {hint}")


def image_files(root: Path) -> list[tuple[str, ...]]:
    """Every image below `root` by suffix, as path parts relative to it, in the same order on every machine.

    Raises:
        DataError: A file name is not valid UTF-8, or there is no image.
    """
    found = []
    for entry in _entries(root):
        if entry.is_dir():
            found += [parts for parts in _files(entry, (entry.name,)) if _is_image(parts[-1])]
        elif _is_image(entry.name):
            found.append((entry.name,))
    if not found:
        raise DataError(f"{root} holds no image ({', '.join(sorted(_SUFFIXES))})")
    return [tuple(_utf8(part) for part in parts) for parts in found]


def _read(root: Path, split: Path, known: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], tuple[Item, ...]]:
    """Class names and images below `split`; labels index `known` where given, and ids are relative to `root`."""
    entries = _entries(split)
    folders = [entry for entry in entries if entry.is_dir()]
    loose = [entry.name for entry in entries if not entry.is_dir() and _is_image(entry.name)]
    if not folders:
        found = f"{_count(loose, 'image')} but no class folders" if loose else "no class folders"
        raise DataError(f"{split} holds {found}; put the images of each class into a folder named after the class")
    if loose:
        raise DataError(
            f"{split} holds {_count(loose, 'image')} outside the class folders ({_listing(loose)}); "
            "move them into the folder of their class"
        )
    classes = tuple(entry.name for entry in folders)
    if known is not None and (extra := [name for name in classes if name not in known]):
        raise DataError(f"{split} has classes that train/ lacks: {_listing(extra)}; heads cannot know them")
    labels = {name: label for label, name in enumerate(known or classes)}
    prefix = split.relative_to(root).parts

    items: list[Item] = []
    strays: list[str] = []
    for folder in folders:
        before = len(items), len(strays)
        for parts in _files(folder, (*prefix, folder.name)):
            name = "/".join(parts)
            if not _is_image(name):
                strays.append(name)
                continue
            path = root.joinpath(*parts)
            load = functools.partial(read_file, path)
            items.append(Item(id=_utf8(name), label=labels[folder.name], load=load, file=path))
        if (len(items), len(strays)) == before:
            raise DataError(f"the class folder {split / folder.name} holds no image; add some or remove the folder")
    if strays:
        are = "are not images" if len(strays) > 1 else "is not an image"
        raise DataError(
            f"{_count(strays, 'file')} in the class folders of {split} {are} by suffix: {_listing(strays)}; "
            "move them out"
        )
    return classes, tuple(items)


def _files(
    folder: os.DirEntry[str], parts: tuple[str, ...], above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, ...]]:
    """Every file below `folder`, as path parts behind `parts`, in the same order on every machine."""
    real = os.path.realpath(folder.path)
    if real in above:  # a link back to a folder that is being read already
        return
    for entry in _entries(Path(folder.path)):
        if entry.is_dir():
            yield from _files(entry, (*parts, entry.name), above | {real})
        else:  # a broken link too: it is an image that cannot be read, not one that is not there
            yield (*parts, entry.name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in `folder` without the hidden files that desktops leave, sorted by name."""
    try:
        with os.scandir(folder) as found:
            kept = [e for e in found if not e.name.startswith(".") and e.name.lower() not in _IGNORED]
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}") from error
    return sorted(kept, key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def _utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the file name {name!r} is not valid UTF-8 and cannot go into a report; rename it") from None
    return name


def read_file(path: Path) -> PIL.Image.Image:
    """The picture at `path`; DataError names it when it cannot be read."""
    return read_image(path, name=str(path))


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''}"


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
