"""Data sets: where labelled images come from."""

from robustbench_x.data.dataset import (
    Dataset,
    DataSource,
    Item,
    draw_subset,
    open_dataset,
    read_image,
    stratified_split,
)

__all__ = ["DataSource", "Dataset", "Item", "draw_subset", "open_dataset", "read_image", "stratified_split"]
