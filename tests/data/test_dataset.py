"""Opening, drawing, splitting and decoding, against independent checks."""

import io
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from robustbench_x.data import Dataset, DataSource, Item, draw_subset, open_dataset, read_image, stratified_split
from robustbench_x.errors import ConfigError, DataError, NothingEvaluatedError, UnknownNameError
from robustbench_x.registry import Registry

LONG_TAIL = [300] + [20] * 5 + [1] * 60


def make_items(sizes: Sequence[int]) -> tuple[Item, ...]:
    """Items of classes with these sizes, classes interleaved at random."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return tuple(
        Item(id=f"{i}", label=int(label), load=lambda: PIL.Image.new("RGB", (1, 1))) for i, label in enumerate(labels)
    )


def registry_with(*items: Item) -> Registry:
    registry = Registry()

    def opener(source: str, rest: str, seed: int) -> Dataset:
        return Dataset(source=source, classes=("a",), train=(), test=items, notes=(rest, str(seed)))

    registry.add_data(DataSource(scheme="mine", usage="mine:X", summary="", open=opener))
    return registry


def test_a_scheme_is_handed_everything_after_the_first_colon_and_the_seed() -> None:
    dataset = open_dataset("mine:a:b?c=*.tar", registry_with(*make_items([2])), seed=7)
    assert dataset.notes == ("a:b?c=*.tar", "7")


def test_an_unknown_scheme_lists_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match="did you mean mine"):
        open_dataset("mined:x", registry_with())


def test_a_missing_scheme_says_how_to_write_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write folder:"):
        open_dataset(str(tmp_path), registry_with())
    with pytest.raises(ConfigError, match="packaged:photos"):
        open_dataset("nowhere", registry_with())


def test_an_empty_evaluation_split_is_an_error() -> None:
    with pytest.raises(NothingEvaluatedError, match="no image to evaluate"):
        open_dataset("mine:x", registry_with())


def test_repeated_ids_are_refused() -> None:
    item = make_items([1])[0]
    with pytest.raises(DataError, match="'0' occurs 2 times"):
        open_dataset("mine:x", registry_with(item, item))


@pytest.mark.parametrize("sizes", [[50] * 10, [5, 17, 120, 33], LONG_TAIL, [1] * 40])
def test_a_larger_subset_keeps_every_item_of_a_smaller_one_in_pool_order(sizes: list[int]) -> None:
    items = make_items(sizes)
    smaller: set[str] = set()
    for count in range(1, len(items) + 2):
        drawn = draw_subset(items, count, seed=3)
        ids = [int(item.id) for item in drawn]
        assert len(drawn) == min(count, len(items))
        assert ids == sorted(set(ids))
        assert smaller <= {item.id for item in drawn}
        smaller = {item.id for item in drawn}


@pytest.mark.parametrize("sizes", [[50] * 10, [5, 17, 120, 33], LONG_TAIL])
def test_subset_classes_keep_their_shares(sizes: list[int]) -> None:
    """There is one share that every class meets up to less than a whole item."""
    items = make_items(sizes)
    for count in range(1, len(items)):
        drawn = Counter(item.label for item in draw_subset(items, count, seed=5))
        most_required = max(Fraction(drawn[label] - 1, size) for label, size in enumerate(sizes))
        least_allowed = min(Fraction(drawn[label] + 1, size) for label, size in enumerate(sizes))
        assert most_required < least_allowed


def test_subset_of_equal_classes_is_exactly_balanced() -> None:
    drawn = Counter(item.label for item in draw_subset(make_items([30] * 8), 8 * 7, seed=1))
    assert set(drawn.values()) == {7}


def test_every_item_is_about_equally_likely_to_be_drawn() -> None:
    items = make_items(LONG_TAIL)
    count, draws = len(items) // 5, 400
    by_class: Counter[int] = Counter()
    for seed in range(draws):
        by_class.update(item.label for item in draw_subset(items, count, seed=seed))
    share = count / len(items)
    singles = sum(by_class[label] for label, size in enumerate(LONG_TAIL) if size == 1) / (draws * 60)
    assert singles == pytest.approx(share, abs=0.03)
    assert by_class[0] / (draws * 300) == pytest.approx(share, abs=0.02)


def test_the_seed_decides_the_subset() -> None:
    items = make_items([40] * 5)
    assert draw_subset(items, 25, seed=1) == draw_subset(items, 25, seed=1)
    assert draw_subset(items, 25, seed=1) != draw_subset(items, 25, seed=2)
    assert draw_subset(items, None, seed=1) == items


@pytest.mark.parametrize("count", [0, -3])
def test_a_subset_of_nothing_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="ask for 1 or more"):
        draw_subset(make_items([5]), count, seed=0)


def test_a_split_partitions_every_class() -> None:
    sizes = [2, 3, 10, 45]
    items = make_items(sizes)
    train, test = stratified_split(items, test_share=0.2, seed=0)
    assert sorted([*train, *test], key=lambda item: int(item.id)) == list(items)
    counts = Counter(item.label for item in test)
    assert [counts[label] for label in range(4)] == [1, 1, 2, 9]
    assert stratified_split(items, test_share=0.2, seed=0) == (train, test)
    assert stratified_split(items, test_share=0.2, seed=1) != (train, test)


def test_a_split_leaves_something_to_train_on() -> None:
    train, _ = stratified_split(make_items([3]), test_share=0.99, seed=0)
    assert len(train) == 1


def test_a_class_of_one_image_cannot_be_split() -> None:
    with pytest.raises(DataError, match="two images of every class, but the class of 0 has no other"):
        stratified_split(make_items([1]), test_share=0.2, seed=0)


def encode(image: PIL.Image.Image, kind: str = "png") -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    buffer.seek(0)
    return buffer


def test_sixteen_bit_grey_is_scaled_instead_of_clipped() -> None:
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    image = read_image(encode(PIL.Image.fromarray(levels)), name="x")
    assert np.asarray(image.convert("RGB"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_float_pixels_are_refused() -> None:
    with pytest.raises(DataError, match="x holds F-mode pixels"):
        read_image(encode(PIL.Image.new("F", (2, 2)), "tiff"), name="x")


def test_damaged_bytes_are_named() -> None:
    with pytest.raises(DataError, match="row 17 cannot be read as an image: cannot identify"):
        read_image(io.BytesIO(b"not a picture"), name="row 17")
