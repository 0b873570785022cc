"""`folder:DIR` on real files."""

import pickle
import re
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from robustbench_x.data import Dataset, Item
from robustbench_x.data.folder import SOURCE
from robustbench_x.errors import DataError


def put(path: Path, *, size: tuple[int, int] = (6, 4), color: tuple[int, int, int] = (200, 30, 90)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, color).save(path)
    return path


def open_folder(root: Path, *, seed: int = 0) -> Dataset:
    return SOURCE.open(f"folder:{root}", str(root), seed)


def ids(items: tuple[Item, ...]) -> list[str]:
    return [item.id for item in items]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Two classes of ten images, without splits."""
    for index in range(10):
        put(tmp_path / "cat" / f"{index}.png")
        put(tmp_path / "ant" / f"{index}.JPG")
    return tmp_path


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    put(tmp_path / "train/cat/1.png")
    put(tmp_path / "train/ant/1.png")
    put(tmp_path / "test/cat/deep/er/9.png", color=(1, 2, 3))
    put(tmp_path / "val/cat/7.png")
    put(tmp_path / "scans/cat/7.png")
    (tmp_path / "README.md").write_text("about")
    dataset = open_folder(tmp_path)
    assert dataset.classes == ("ant", "cat")
    assert ids(dataset.train) == ["train/ant/1.png", "train/cat/1.png"]
    assert ids(dataset.test) == ["test/cat/deep/er/9.png"]
    assert [item.label for item in dataset.train + dataset.test] == [0, 1, 1]
    assert dataset.test[0].load().getpixel((0, 0)) == (1, 2, 3)
    assert any("val/ was left out" in note for note in dataset.notes)


def test_val_serves_where_test_is_missing(tmp_path: Path) -> None:
    put(tmp_path / "train/cat/1.png")
    put(tmp_path / "val/cat/7.png")
    assert ids(open_folder(tmp_path).test) == ["val/cat/7.png"]


def test_an_evaluation_split_alone_has_nothing_to_train_on(tmp_path: Path) -> None:
    put(tmp_path / "val/cat/7.png")
    dataset = open_folder(tmp_path)
    assert dataset.train == ()
    assert ids(dataset.test) == ["val/cat/7.png"]


def test_train_alone_says_what_to_add(tmp_path: Path) -> None:
    put(tmp_path / "train/cat/1.png")
    with pytest.raises(DataError, match=r"neither test/ nor val/ .* write folder:.*train"):
        open_folder(tmp_path)


def test_a_class_that_train_lacks_is_named(tmp_path: Path) -> None:
    put(tmp_path / "train/cat/1.png")
    put(tmp_path / "test/cat/1.png")
    put(tmp_path / "test/dog/1.png")
    with pytest.raises(DataError, match="classes that train/ lacks: dog"):
        open_folder(tmp_path)


def test_without_splits_the_seed_holds_out_a_fifth_of_every_class(flat: Path) -> None:
    dataset = open_folder(flat, seed=4)
    assert sorted(ids(dataset.train) + ids(dataset.test)) == sorted(
        [f"ant/{i}.JPG" for i in range(10)] + [f"cat/{i}.png" for i in range(10)]
    )
    assert sorted(item.label for item in dataset.test) == [0, 0, 1, 1]
    assert open_folder(flat, seed=4) == dataset
    assert any(ids(open_folder(flat, seed=seed).test) != ids(dataset.test) for seed in range(5, 10))


def test_hidden_and_desktop_files_are_ignored(flat: Path) -> None:
    for name in (".DS_Store", "._1.png", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/1.png"):
        (flat / "cat" / name).parent.mkdir(exist_ok=True)
        (flat / "cat" / name).write_bytes(b"x")
    (flat / ".git").mkdir()
    dataset = open_folder(flat)
    assert len(dataset.train + dataset.test) == 20


def test_one_stray_file_is_an_error(flat: Path) -> None:
    (flat / "cat/labels.csv").write_text("x")
    with pytest.raises(DataError, match=r"^1 file in .* is not an image by suffix: cat/labels\.csv; move"):
        open_folder(flat)


def test_many_stray_files_are_counted_and_the_first_listed(flat: Path) -> None:
    for index in range(7):
        (flat / f"ant/note{index}.txt").write_text("x")
    with pytest.raises(
        DataError,
        match=r"^7 files .* are not images by suffix: ant/note0\.txt, .*ant/note4\.txt and 2 more; move them out",
    ) as info:
        open_folder(flat)
    assert "note5" not in str(info.value)
    assert info.value.exit_code == 2


def test_images_outside_the_class_folders_are_not_dropped(flat: Path) -> None:
    put(flat / "lost.png")
    with pytest.raises(DataError, match=r"1 image outside the class folders \(lost\.png\)"):
        open_folder(flat)


def test_a_class_without_images_is_named(flat: Path) -> None:
    (flat / "owl").mkdir()
    with pytest.raises(DataError, match=r"class folder .*owl holds no image"):
        open_folder(flat)


def test_images_without_class_folders_say_how_to_sort_them(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    with pytest.raises(
        DataError, match="holds 1 image but no class folders; put the images of each class into a folder"
    ):
        open_folder(tmp_path)


def test_a_missing_folder_names_its_near_siblings(flat: Path) -> None:
    with pytest.raises(DataError, match=rf"there is no folder .*; did you mean {re.escape(str(flat / 'cat'))}\b"):
        open_folder(flat / "cats")
    with pytest.raises(DataError, match="check the path"):
        open_folder(flat / "no" / "where")
    with pytest.raises(DataError, match="is a file"):
        open_folder(flat / "cat/1.png")
    with pytest.raises(DataError, match="names no folder"):
        SOURCE.open("folder:", "", 0)


def test_exif_orientation_is_applied(flat: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    PIL.Image.new("RGB", (6, 4)).save(flat / "ant/0.JPG", exif=exif)
    assert find(open_folder(flat), "ant/0.JPG").load().size == (4, 6)


def find(dataset: Dataset, name: str) -> Item:
    (item,) = (item for item in dataset.train + dataset.test if item.id == name)
    return item


def test_an_undecodable_file_is_found_when_it_is_loaded(flat: Path) -> None:
    (flat / "cat/3.png").write_bytes(b"no picture")
    item = find(open_folder(flat), "cat/3.png")
    with pytest.raises(DataError, match=r"cat/3\.png cannot be read as an image: cannot identify"):
        item.load()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".tif"])
def test_a_truncated_file_is_unreadable(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for index in range(2):
        (tmp_path / "cat").mkdir(exist_ok=True)
        PIL.Image.fromarray(noise).save(tmp_path / f"cat/{index}{suffix}")
    path = tmp_path / f"cat/0{suffix}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    dataset = open_folder(tmp_path)
    with pytest.raises(DataError, match=rf"cat/0\{suffix} cannot be read as an image: \w"):
        find(dataset, f"cat/0{suffix}").load()
    assert find(dataset, f"cat/1{suffix}").load().size == (64, 64)


def test_a_file_deleted_in_the_meantime_is_named(flat: Path) -> None:
    item = find(open_folder(flat), "cat/5.png")
    (flat / "cat/5.png").unlink()
    with pytest.raises(DataError, match=r"cat/5\.png cannot be read as an image: No such file"):
        item.load()


def test_a_decompression_bomb_is_refused(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(flat / "cat/5.png", size=(100, 100))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(DataError, match=r"cat/5\.png .* decompression bomb"):
        find(open_folder(flat), "cat/5.png").load()


def test_links_are_followed_and_loops_are_not(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    put(elsewhere / "more/a.png")
    (flat / "owl").symlink_to(elsewhere)
    (flat / "owl/more/again").symlink_to(elsewhere)
    (flat / "owl/b.png").symlink_to(flat / "cat/1.png")
    (flat / "owl/gone.png").symlink_to(elsewhere / "nothing.png")
    dataset = open_folder(flat)
    owls = sorted(name for name in ids(dataset.train + dataset.test) if name.startswith("owl/"))
    assert owls == ["owl/b.png", "owl/gone.png", "owl/more/a.png"]
    with pytest.raises(DataError, match=r"owl/gone\.png cannot be read"):
        find(dataset, "owl/gone.png").load()


def test_items_travel_to_worker_processes(flat: Path) -> None:
    item = open_folder(flat).test[0]
    assert pickle.loads(pickle.dumps(item)).load().size == (6, 4)


def test_opening_decodes_nothing(tmp_path: Path) -> None:
    for index in range(5000):
        path = tmp_path / f"{index % 10}" / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    start = time.process_time()
    assert len(open_folder(tmp_path).train) == 4000
    assert time.process_time() - start < 2  # 100,000 files within 40 s, even on a slow machine
