"""`images:DIR`: every image below a folder, without labels: what an attacker trains on, or what `rbx craft` reads."""

import functools

from robustbench_x.data.dataset import Dataset, DataSource, Item
from robustbench_x.data.folder import existing_folder, image_files, read_file

__all__ = ["SOURCE"]


def _open(source: str, rest: str, _seed: int) -> Dataset:
    root = existing_folder(source, rest)
    items = tuple(
        Item(id="/".join(parts), label=0, load=functools.partial(read_file, path), file=path)
        for parts, path in ((parts, root.joinpath(*parts)) for parts in image_files(root))
    )
    note = "no labels: a surrogate set; nothing can be audited on it"
    return Dataset(source=source, classes=("unlabelled",), train=(), test=items, notes=(note,))


SOURCE = DataSource(
    scheme="images",
    usage="images:DIR",
    summary="every image below a folder, without labels: a surrogate set",
    open=_open,
)
