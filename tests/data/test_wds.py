"""`wds:PATTERN` on shards written with `tarfile`."""

import io
import pickle
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from robustbench_x.data import Dataset, Item, open_dataset
from robustbench_x.data.wds import SOURCE, expand
from robustbench_x.errors import DataError
from robustbench_x.registry import Registry


def picture(shade: int, *, kind: str = "png", side: int = 4) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (side, side), (shade, 90, 30)).save(buffer, kind)
    return buffer.getvalue()


def noise(kind: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def labelled(labels: Iterable[str], *, start: int = 0) -> list[tuple[str, bytes]]:
    """One sample of two members for every label; the shade of its image is its number."""
    members = []
    for number, label in enumerate(labels, start=start):
        members += [(f"{number:03d}.png", picture(number)), (f"{number:03d}.cls", label.encode())]
    return members


def open_wds(pattern: Path | str, *, seed: int = 0) -> Dataset:
    return SOURCE.open(f"wds:{pattern}", str(pattern), seed)


def everything(dataset: Dataset) -> list[Item]:
    return sorted(dataset.train + dataset.test, key=lambda item: item.id)


def shade(item: Item) -> int:
    levels = np.asarray(item.load())
    assert (levels == levels[0, 0]).all()
    return int(levels[0, 0, 0])


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        ("train.tar", ["train.tar"]),
        ("s-{0..2}.tar", ["s-0.tar", "s-1.tar", "s-2.tar"]),
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("s-{08..10}.tar", ["s-08.tar", "s-09.tar", "s-10.tar"]),
        ("s-{0098..0101}.tar", ["s-0098.tar", "s-0099.tar", "s-0100.tar", "s-0101.tar"]),
        ("s-{7..7}.tar", ["s-7.tar"]),
        ("{b,a,long name}/x.tar", ["b/x.tar", "a/x.tar", "long name/x.tar"]),
        ("{a,b}/{1..2}.tar", ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]),
        ("s{,-extra}.tar", ["s.tar", "s-extra.tar"]),
        ("s-*.tar", ["s-*.tar"]),
    ],
)
def test_braces_are_written_out_as_a_shell_does(pattern: str, written: list[str]) -> None:
    assert expand(pattern) == written


def test_labelled_shards_are_split_by_the_seed(tmp_path: Path) -> None:
    write_shard(tmp_path / "s-00.tar", labelled(["owl", "cat"] * 10))
    write_shard(tmp_path / "s-01.tar", labelled(["cat", "ant"] * 10, start=20))
    dataset = open_wds(tmp_path / "s-{00..01}.tar")
    assert dataset.classes == ("ant", "cat", "owl")
    assert Counter(dataset.classes[item.label] for item in dataset.train) == {"cat": 16, "owl": 8, "ant": 8}
    assert Counter(dataset.classes[item.label] for item in dataset.test) == {"cat": 4, "owl": 2, "ant": 2}
    expected = [*["owl", "cat"] * 10, *["cat", "ant"] * 10]
    assert [dataset.classes[item.label] for item in everything(dataset)] == expected
    assert [shade(item) for item in everything(dataset)] == list(range(40))
    assert open_wds(tmp_path / "s-{00..01}.tar") == dataset
    assert open_wds(tmp_path / "s-{00..01}.tar", seed=1).test != dataset.test
    assert any("held out by the seed 0" in note for note in dataset.notes)


def test_unlabelled_shards_are_a_surrogate_set(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [(f"{number}.png", picture(number)) for number in range(5)])
    dataset = open_wds(tmp_path / "s.tar")
    assert (dataset.train, dataset.classes) == ((), ("unlabelled",))
    assert [item.id for item in dataset.test] == [f"s.tar/{number}" for number in range(5)]
    assert [(item.label, shade(item)) for item in dataset.test] == [(0, number) for number in range(5)]
    assert any("no labels" in note for note in dataset.notes)


def test_numbers_are_sorted_as_numbers_and_before_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", labelled(["10", "9", "100", "2", "owl", "1b"] * 2))
    dataset = open_wds(tmp_path / "s.tar")
    assert dataset.classes == ("2", "9", "10", "100", "1b", "owl")
    assert [dataset.classes[item.label] for item in everything(dataset)] == ["10", "9", "100", "2", "owl", "1b"] * 2


def test_a_sample_is_all_members_of_one_name(tmp_path: Path) -> None:
    members = [
        ("a/1.cls", b" cat\n"),
        ("a/1.json", b"{}"),
        ("a/1.PNG", picture(1)),
        ("a/1.mask.png", picture(200)),
        ("b/1.jpeg", noise("jpeg")),
        ("b/1.txt", b"a caption"),
        ("b/1.cls", b"cat"),
        ("v1.0/2.x.webp", picture(201)),
        ("v1.0/2.webp", noise("webp")),
        ("v1.0/2.cls", "schl\u00e4fer".encode()),
        ("v1.0/3.jpg", noise("jpeg")),
        ("v1.0/3.cls", "schl\u00e4fer".encode()),
        ("README", b"about"),
        ("lost.cls", b"nobody"),
    ]
    write_shard(tmp_path / "s.tar", members)
    dataset = open_wds(tmp_path / "s.tar")
    assert dataset.classes == ("cat", "schl\u00e4fer")
    found = {item.id: item for item in everything(dataset)}
    assert {name: item.label for name, item in found.items()} == {
        "s.tar/a/1": 0,
        "s.tar/b/1": 0,
        "s.tar/v1.0/2": 1,
        "s.tar/v1.0/3": 1,
    }
    assert shade(found["s.tar/a/1"]) == 1
    assert {item.load().size for name, item in found.items() if name != "s.tar/a/1"} == {(64, 64)}


def test_folders_and_links_in_a_shard_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("folder.png", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere.png"
            tar.addfile(info)
        info = tarfile.TarInfo("x" * 200 + ".png")  # a long name takes headers of its own
        info.size = len(picture(7))
        tar.addfile(info, io.BytesIO(picture(7)))
    dataset = open_wds(path)
    assert [item.id for item in dataset.test] == ["s.tar/" + "x" * 200]
    assert shade(dataset.test[0]) == 7


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read(tmp_path: Path, form: int) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.png")
            info.size, info.mtime = len(picture(number)), 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(picture(number)))
    assert [shade(item) for item in open_wds(tmp_path / "s.tar").test] == [0, 1, 2]


def test_ids_are_unique_across_shards(tmp_path: Path) -> None:
    for name in ("s-0.tar", "s-1.tar", "s-2.tar"):
        write_shard(tmp_path / name, labelled(["cat", "owl"] * 3))
    registry = Registry()
    registry.add_data(SOURCE)
    for pattern in ("s-{0..2}.tar", "s-*.tar", "{s-0,s-1,s-2}.tar"):
        dataset = open_dataset(f"wds:{tmp_path / pattern}", registry)
        ids = {item.id for item in everything(dataset)}
        assert ids == {f"s-{shard}.tar/{number:03d}" for shard in range(3) for number in range(6)}


def test_the_same_shard_twice_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", labelled(["cat", "owl"] * 3))
    registry = Registry()
    registry.add_data(SOURCE)
    with pytest.raises(DataError, match=r"the image id 's\.tar/00\d' occurs 2 times"):
        open_dataset(f"wds:{tmp_path}/{{s,s}}.tar", registry)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "s-0.tar", labelled(["cat", "owl"] * 3))
    with pytest.raises(DataError, match=r"there is no shard .*s-1\.tar"):
        open_wds(tmp_path / "s-{0..1}.tar")
    with pytest.raises(DataError, match=r"there is no shard .*t-\*\.tar"):
        open_wds(tmp_path / "t-*.tar")
    with pytest.raises(DataError, match="there is no shard"):
        open_wds(tmp_path)
    with pytest.raises(DataError, match=r"'wds:' names no shards; write wds:shards/train-\{0000\.\.0009\}\.tar"):
        SOURCE.open("wds:", "", 0)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_refused(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(str(path), f"w:{compression}") as tar:  # type: ignore[call-overload]
        info = tarfile.TarInfo("1.png")
        info.size = len(picture(1))
        tar.addfile(info, io.BytesIO(picture(1)))
    with pytest.raises(DataError, match=r"s\.tar cannot be read as an uncompressed tar: \w"):
        open_wds(path)


@pytest.mark.parametrize("content", [b"", b"no tar at all " * 100], ids=["empty", "text"])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"s\.tar cannot be read as an uncompressed tar: \w"):
        open_wds(tmp_path / "s.tar")


def test_a_shard_that_ends_inside_an_image_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", [("1.png", picture(1)), ("2.png", noise("png"))])
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"s\.tar cannot be read as an uncompressed tar: unexpected end"):
        open_wds(path)


def test_a_shard_without_images_says_what_an_image_is(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [("1.cls", b"cat"), ("1.txt", b"about"), ("2.bmp", picture(1, kind="bmp"))])
    with pytest.raises(DataError, match=r"its shards hold no image \(jpg, jpeg, png, webp\)"):
        open_wds(tmp_path / "s.tar")


def test_a_sample_without_a_label_among_labelled_ones_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "s-0.tar", labelled(["cat", "owl"] * 3))
    write_shard(tmp_path / "s-1.tar", [*labelled(["cat"]), ("bare.png", picture(9)), ("bare.txt", b"cat")])
    with pytest.raises(DataError, match=r"s-1\.tar: bare has no \.cls, though other samples have one"):
        open_wds(tmp_path / "s-{0..1}.tar")


@pytest.mark.parametrize(("first", "second"), [("1.png", "1.jpg"), ("1.png", "1.png"), ("a/1.webp", "a/1.JPEG")])
def test_two_images_of_one_name_are_refused(tmp_path: Path, first: str, second: str) -> None:
    write_shard(tmp_path / "s.tar", [(first, picture(1)), ("2.png", picture(2)), (second, picture(3))])
    with pytest.raises(DataError, match=r"s\.tar: the sample (a/)?1 has two files \.\w+ or two images"):
        open_wds(tmp_path / "s.tar")


def test_two_labels_of_one_name_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [*labelled(["cat", "owl"]), ("000.cls", b"owl")])
    with pytest.raises(DataError, match=r"the sample 000 has two files \.cls"):
        open_wds(tmp_path / "s.tar")


def test_a_label_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [("1.png", picture(1)), ("1.cls", b"\xff\xfe\x00")])
    with pytest.raises(DataError, match=r"s\.tar cannot be read as an uncompressed tar: 'utf-8' codec"):
        open_wds(tmp_path / "s.tar")


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", labelled(["cat", "cat", "owl"]))
    with pytest.raises(DataError, match=r"the class of s\.tar/002 has no other"):
        open_wds(tmp_path / "s.tar")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_damaged_image_is_found_when_it_is_loaded(tmp_path: Path, kind: str) -> None:
    half = noise(kind)[: len(noise(kind)) // 2]
    members = [
        (f"whole.{kind}", noise(kind)),
        (f"half.{kind}", half),
        (f"text.{kind}", b"no picture"),
        ("none.png", b""),
    ]
    write_shard(tmp_path / "s.tar", members)
    found = {item.id: item for item in open_wds(tmp_path / "s.tar").test}
    assert found["s.tar/whole"].load().size == (64, 64)
    for name in ("half", "text", "none"):
        with pytest.raises(DataError, match=rf"s\.tar:{name} cannot be read as an image: \w"):
            found[f"s.tar/{name}"].load()


def test_a_shard_that_went_away_is_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", [("1.png", picture(1))])
    item = open_wds(path).test[0]
    path.unlink()
    with pytest.raises(DataError, match=r"s\.tar:1 cannot be read: No such file"):
        item.load()


def test_items_travel_to_worker_processes_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "s.tar", [("1.png", picture(1)), ("2.png", picture(2))])
    monkeypatch.chdir(tmp_path)
    stored = pickle.dumps(open_wds("s.tar").test)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [shade(item) for item in pickle.loads(stored)] == [1, 2]


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "shards/s-0.tar", [("1.png", picture(1))])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [item.id for item in open_wds("~/shards/s-*.tar").test] == ["s-0.tar/1"]
