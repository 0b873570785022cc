"""Unlabelled images to train an attack on: `images:DIR` on real files, and `packaged:crops`."""

import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from robustbench_x.data import Dataset, Item, open_dataset
from robustbench_x.data.images import SOURCE
from robustbench_x.data.packaged import SOURCE as PACKAGED
from robustbench_x.errors import DataError
from robustbench_x.registry import Registry


def put(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (6, 4), (shade, 90, 30)).save(path)
    return path


def open_images(root: Path, *, seed: int = 0) -> Dataset:
    return SOURCE.open(f"images:{root}", str(root), seed)


def ids(dataset: Dataset) -> list[str]:
    return [item.id for item in dataset.test]


def find(dataset: Dataset, name: str) -> Item:
    (item,) = (item for item in dataset.test if item.id == name)
    return item


def test_images_are_found_at_any_depth(tmp_path: Path) -> None:
    names = ["b.png", "a/2.JPG", "a/1.bmp", "a/deep/er/still/9.webp", "train/x.png", "c/only.gif"]
    for shade, name in enumerate(names):
        put(tmp_path / name, shade)
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a/labels.csv").write_text("1,cat")
    dataset = open_images(tmp_path)
    assert sorted(ids(dataset)) == sorted(names)
    assert (dataset.train, dataset.classes) == ((), ("unlabelled",))
    assert {item.label for item in dataset.test} == {0}
    assert find(dataset, "b.png").load().getpixel((0, 0)) == (0, 90, 30)
    assert find(dataset, "train/x.png").load().getpixel((0, 0)) == (4, 90, 30)
    assert any("no labels" in note for note in dataset.notes)


def test_the_order_of_images_is_that_of_their_names(tmp_path: Path) -> None:
    for name in ("z.png", "b/2.png", "b/10.png", "a.png", "B/1.png"):
        put(tmp_path / name)
    assert ids(open_images(tmp_path)) == ["B/1.png", "a.png", "b/10.png", "b/2.png", "z.png"]
    assert open_images(tmp_path, seed=9) == open_images(tmp_path)


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("1.png", "._1.png", ".cache/2.png", "a/.3.png", "a/.git/4.png", "a/5.png"):
        put(tmp_path / name)
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    assert ids(open_images(tmp_path)) == ["1.png", "a/5.png"]


def test_a_folder_without_images_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("about")
    put(tmp_path / ".hidden.png")
    with pytest.raises(DataError, match=r"holds no image \(\.bmp, "):
        open_images(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    put(tmp_path / "pictures/1.png")
    with pytest.raises(DataError, match=r"there is no folder .*picture; did you mean .*pictures"):
        open_images(tmp_path / "picture")
    with pytest.raises(DataError, match="is a file"):
        open_images(tmp_path / "pictures/1.png")
    with pytest.raises(DataError, match="'images:' names no folder"):
        SOURCE.open("images:", "", 0)


def test_a_broken_image_is_found_when_it_is_loaded(tmp_path: Path) -> None:
    put(tmp_path / "a/whole.png")
    (tmp_path / "a/text.png").write_bytes(b"no picture")
    half = tmp_path / "a/half.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(half)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    dataset = open_images(tmp_path)
    assert len(dataset.test) == 4
    assert find(dataset, "a/whole.png").load().size == (6, 4)
    for name in ("a/text.png", "a/half.png", "gone.png"):
        with pytest.raises(DataError, match=rf"{name} cannot be read as an image: \w"):
            find(dataset, name).load()


def test_images_travel_to_worker_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "pictures/1.png", 7)
    monkeypatch.chdir(tmp_path)
    stored = pickle.dumps(open_images(Path("pictures")).test[0])
    monkeypatch.chdir(tmp_path / "pictures")
    assert pickle.loads(stored).load().getpixel((0, 0)) == (7, 90, 30)


@pytest.fixture
def crops() -> Dataset:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    return PACKAGED.open("packaged:crops", "crops", 0)


def test_crops_are_ten_thousand_without_labels(crops: Dataset) -> None:
    assert (crops.train, crops.classes, len(crops.test)) == ((), ("unlabelled",), 10_000)
    assert len({item.id for item in crops.test}) == 10_000
    assert {item.label for item in crops.test} == {0}
    assert crops.license
    registry = Registry()
    registry.add_data(PACKAGED)
    assert open_dataset("packaged:crops", registry, seed=5) == crops


def test_crops_are_squares_of_many_sizes(crops: Dataset) -> None:
    sizes = []
    for item in crops.test[::100]:
        image = item.load()
        assert image.mode == "RGB"
        assert image.width == image.height >= 64
        sizes.append(image.width)
    assert min(sizes) < 120
    assert max(sizes) > 400
    assert len(set(sizes)) > 60


def test_a_crop_is_always_the_same_and_no_other(crops: Dataset) -> None:
    again = PACKAGED.open("packaged:crops", "crops", 99).test
    seen = set()
    for number in range(0, 10_000, 250):
        pixels = np.asarray(crops.test[number].load())
        for other in (again[number], crops.test[number], pickle.loads(pickle.dumps(again[number]))):
            assert np.array_equal(pixels, np.asarray(other.load()))
        seen.add(pixels.tobytes())
    assert len(seen) == 40


def test_a_crop_is_a_part_of_a_photograph(crops: Dataset) -> None:
    """Two photographs whose packages can show them, against every place of a crop in them."""
    datasets = pytest.importorskip("sklearn.datasets")
    photographs = datasets.load_sample_images().images
    found = 0
    for item in crops.test[:60]:
        crop = np.asarray(item.load())
        side = len(crop)
        for photograph in photographs:
            if side > min(photograph.shape[:2]):
                continue
            corners = photograph[: photograph.shape[0] - side + 1, : photograph.shape[1] - side + 1]
            for top, left in np.argwhere((corners == crop[0, 0]).all(axis=2)).tolist():
                if np.array_equal(photograph[top : top + side, left : left + side], crop):
                    found += 1
                    break
    # Two photographs of eleven: 60 crops hold 11 of theirs on average, and hardly ever fewer than 3.
    assert 3 <= found <= 25


def test_changing_a_crop_leaves_the_next_one_alone(crops: Dataset) -> None:
    item = crops.test[0]
    before = np.asarray(item.load()).copy()
    item.load().paste((0, 0, 0), (0, 0, 64, 64))
    assert np.array_equal(np.asarray(item.load()), before)
