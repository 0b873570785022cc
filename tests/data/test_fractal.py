"""`fractal:` images: determinism, content, and whether their classes can be told apart."""

import pickle
import time

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from robustbench_x.data import Dataset, Item
from robustbench_x.data.fractal import SOURCE
from robustbench_x.errors import ConfigError


def open_fractal(options: str, *, audit_seed: int = 0) -> Dataset:
    return SOURCE.open(f"fractal:{options}", options, audit_seed)


def pixels(item: Item) -> NDArray[np.uint8]:
    return np.asarray(item.load())


def test_the_defaults_are_ten_classes_of_224_pixels() -> None:
    dataset = open_fractal("")
    assert (len(dataset.classes), len(dataset.train), len(dataset.test)) == (10, 1000, 200)
    image = dataset.test[0].load()
    assert (image.mode, image.size) == ("RGB", (224, 224))
    assert len({item.id for item in dataset.train + dataset.test}) == 1200


def test_images_do_not_depend_on_the_audit_seed_or_on_the_order_of_calls() -> None:
    first = open_fractal("classes=3,train=2,test=2,size=48")
    second = open_fractal("test=2,size=48,train=2,classes=3", audit_seed=9)
    expected = {item.id: pixels(item) for item in first.train + first.test}
    for item in reversed(second.train + second.test):
        np.testing.assert_array_equal(pixels(item), expected[item.id])


def test_more_classes_and_images_keep_the_earlier_ones() -> None:
    small = open_fractal("classes=3,train=1,test=1,size=32")
    more = open_fractal("classes=12,train=3,test=2,size=32")
    large = {item.id: item for item in more.train + more.test}
    for item in small.train + small.test:
        np.testing.assert_array_equal(pixels(item), pixels(large[item.id]))


def test_no_two_images_are_equal() -> None:
    dataset = open_fractal("classes=3,train=10,test=10,size=32")
    items = dataset.train + dataset.test
    assert len({item.load().tobytes() for item in items}) == len(items)


def test_another_data_seed_is_another_data_set() -> None:
    one, two = (open_fractal(f"classes=2,train=0,test=1,size=32,seed={seed}") for seed in (0, 1))
    assert one.train == ()
    assert not np.array_equal(pixels(one.test[0]), pixels(two.test[0]))


def test_a_larger_size_shows_the_same_picture() -> None:
    small, large = (open_fractal(f"classes=4,train=0,test=1,size={size}") for size in (64, 192))
    for one, other in zip(small.test, large.test, strict=True):
        reduced = grey(other, 16), grey(one, 16)
        assert np.corrcoef(*reduced)[0, 1] > 0.9


def grey(item: Item, side: int) -> NDArray[np.float64]:
    image = item.load().convert("L").resize((side, side), PIL.Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64).ravel() / 255


def test_the_fractal_fills_a_good_part_of_the_frame() -> None:
    """It is brighter than any background and reaches over most of the longer side."""
    for item in open_fractal("classes=40,train=0,test=1,size=96").test:
        lit = pixels(item).max(axis=2) > 115
        rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
        assert 0.08 < lit.mean() < 0.7
        assert max(np.ptp(rows), np.ptp(columns)) > 0.7 * 96


def test_a_simple_classifier_tells_ten_classes_apart() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    dataset = open_fractal("classes=10,train=30,test=10,size=64")
    train, test = (np.stack([grey(item, 32) for item in split]) for split in (dataset.train, dataset.test))
    knn = neighbors.KNeighborsClassifier(3).fit(train, [item.label for item in dataset.train])
    assert knn.score(test, [item.label for item in dataset.test]) > 0.7  # chance is 0.1


def test_an_image_is_quick() -> None:
    items = open_fractal("classes=5,train=0,test=2").test
    items[0].load()
    start = time.process_time()
    for item in items:
        item.load()
    assert (time.process_time() - start) / len(items) < 0.06  # three times the target, for busy machines


def test_items_travel_to_worker_processes() -> None:
    item = open_fractal("classes=2,train=0,test=1,size=32").test[1]
    np.testing.assert_array_equal(pixels(pickle.loads(pickle.dumps(item))), pixels(item))


@pytest.mark.parametrize(
    "options", ["classes=1", "test=0", "size=8", "size=2.5", "train=-1", "train", "train=", "seed=9" * 9]
)
def test_bad_values_are_refused(options: str) -> None:
    with pytest.raises(ConfigError, match="is not a whole number from"):
        open_fractal(options)


def test_unknown_and_repeated_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown option 'clases'; did you mean classes"):
        open_fractal("clases=3")
    with pytest.raises(ConfigError, match="size is given twice"):
        open_fractal("size=32,size=64")
