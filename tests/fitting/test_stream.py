"""Surrogate images that stay in their files: the order, what cannot be read, what is held, and what identifies them."""

import functools
import gc
import io
import json
import resource
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from robustbench_x.data.dataset import Item
from robustbench_x.data.wds import SOURCE
from robustbench_x.encoders.encoder import Preprocessing
from robustbench_x.errors import ConfigError, DataError
from robustbench_x.fitting import make_pool
from robustbench_x.fitting.curve import Curve
from robustbench_x.fitting.stream import Stream, StreamedImages, StreamOrder, stream_digest
from robustbench_x.views import ImagePool

SMALL = Preprocessing(input_size=(16, 16))


@functools.cache
def _jpeg(shade: int, side: int = 20) -> bytes:
    file = io.BytesIO()
    levels = np.random.default_rng(shade).integers(0, 256, (side, side, 3), dtype=np.uint8)
    PIL.Image.fromarray(levels).save(file, "jpeg")
    return file.getvalue()


def _shards(folder: Path, lengths: Sequence[int], broken: Sequence[int] = ()) -> tuple[Item, ...]:
    number = 0
    for shard, length in enumerate(lengths):
        with tarfile.open(folder / f"s-{shard:04d}.tar", "w") as tar:
            for _ in range(length):
                content = b"no image" if number in broken else _jpeg(number % 97)
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                number += 1
    return SOURCE.open("wds:s", str(folder / "s-*.tar"), 0).test


# -- the order


def test_every_image_is_seen_once_an_epoch_in_a_new_order() -> None:
    order = StreamOrder([5, 3, 7, 1, 4], window=6)
    for batch in (3, 20, 33):
        seen = Counter(i for n in range(40) for i in order.index(n, batch=batch, seed=0).tolist())
        assert set(seen) <= set(range(20))
        assert max(seen.values()) - min(seen.values()) <= 1
        assert sum(seen.values()) == 40 * batch
    epochs = [order.index(n, batch=20, seed=0).tolist() for n in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order.index(5, batch=0, seed=0).shape == (0,)


def test_the_order_is_a_function_of_seed_and_step_alone() -> None:
    lengths = [30] * 10
    forward, backward = StreamOrder(lengths, window=50), StreamOrder(lengths, window=50)
    steps = {n: forward.index(n, batch=32, seed=3).tolist() for n in range(40)}
    for n in reversed(range(40)):
        assert backward.index(n, batch=32, seed=3).tolist() == steps[n]
    assert StreamOrder(lengths, window=50).index(0, batch=32, seed=4).tolist() != steps[0]


def test_a_window_reads_few_shards_and_mixes_them() -> None:
    order = StreamOrder([100] * 50, window=250)
    seen = torch.cat([order.index(n, batch=50, seed=0) for n in range(100)])
    for start in range(0, 4800, 300):
        part = seen[start : start + 300]
        shards = part // 100
        assert len(set(shards.tolist())) == 3, "three shards hold 250 images"
        assert len(set(shards[:60].tolist())) == 3, "and are mixed"
    assert not torch.equal(seen.sort().values, seen)


def test_single_files_are_shuffled_as_a_whole() -> None:
    order = StreamOrder([1] * 1000, window=100)
    first = order.index(0, batch=100, seed=0)
    assert first.float().std() > 200


# -- what is handed out


def test_it_hands_out_what_a_pool_in_memory_would(tmp_path: Path) -> None:
    items = _shards(tmp_path, [6, 5])
    pool = make_pool("s", items, SMALL)
    held, streamed = ImagePool(pool.levels), StreamedImages(Stream("s", items, SMALL))
    assert len(held) == len(streamed) == 11
    index = torch.tensor([3, 10, 3, 0])
    assert torch.equal(held.batch(index), streamed.batch(index))
    for expected in ([1, 2], [3], [1, 4]):
        streamed.expect(torch.tensor(expected))
    for wanted in ([1, 2, 3], [4], [1], [9]):
        assert torch.equal(held.batch(torch.tensor(wanted)), streamed.batch(torch.tensor(wanted)))


def test_an_unreadable_image_is_replaced_by_the_next_and_remembered(tmp_path: Path) -> None:
    items = _shards(tmp_path, [6, 5], broken=(3, 4, 10))
    whole = Stream("s", _shards(tmp_path, [6, 5], broken=(3, 4, 10)), SMALL)
    levels = whole.levels(torch.tensor([3, 5, 10, 0, 4]))
    assert torch.equal(levels[0], levels[1])
    assert torch.equal(levels[4], levels[1])
    assert torch.equal(levels[2], levels[3]), "the last is followed by the first"
    assert sorted(whole.lost) == [3, 4, 10]
    assert "s-0000.tar:000003 cannot be read as an image" in whole.lost[3]
    other = Stream("s", items, SMALL)
    other.levels(torch.tensor([0, 1]))
    assert other.lost == {}, "nobody looked"


def test_where_nothing_can_be_read_it_says_so(tmp_path: Path) -> None:
    stream = Stream("wds:s", _shards(tmp_path, [4], broken=range(4)), SMALL)
    with pytest.raises(DataError, match="surrogate wds:s: 4 images in a row cannot be read, the first because"):
        stream.levels(torch.tensor([2]))


def test_what_nobody_asks_for_is_dropped(tmp_path: Path) -> None:
    stream = Stream("s", _shards(tmp_path, [40]), SMALL)
    for start in range(0, 40, 2):
        stream.expect(torch.tensor([start, start + 1]))
    held = [i for batch in stream._expected for i in batch]
    assert held == list(range(28, 40))


def _resident() -> int:
    """Bytes in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _growth(items: tuple[Item, ...], *, batch: int, warm: int) -> tuple[int, int]:
    """Bytes that memory grows by after the first steps while every image is streamed once; and how many these are."""
    images = Stream("s", items, SMALL)
    steps = len(items) // batch
    before = most = 0
    for number in range(steps):
        images.expect(images.index(number + 1, batch=batch, seed=0))
        images.levels(images.index(number, batch=batch, seed=0))
        if number == warm:
            gc.collect()
            before = _resident()
        elif number > warm and number % 10 == 0:
            most = max(most, _resident() - before)
    return most, steps * batch


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's own account of memory")
def test_memory_stays_flat(tmp_path: Path) -> None:
    grown, images = _growth(_shards(tmp_path, [500] * 8), batch=50, warm=20)
    assert images == 4000
    assert grown < 4 << 20, "3000 images of 16 pixels are 2.3 MB decoded as bytes, 9 MB as float"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's own account of memory")
def test_memory_stays_flat_over_a_hundred_thousand_images(tmp_path: Path) -> None:
    grown, images = _growth(_shards(tmp_path, [1000] * 100), batch=100, warm=50)
    assert images == 100_000
    assert grown < 16 << 20, f"{grown / 2**20:.1f} MiB; decoded they are 77 MB as bytes and 307 MB as float"


# -- what identifies it


def test_the_digest_is_of_the_files_and_of_which_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "a"
    folder.mkdir()
    items = _shards(folder, [4, 3])
    first = stream_digest(items)
    assert stream_digest(items) == first
    assert stream_digest(items[:-1]) != first
    copied = tmp_path / "b"
    copied.mkdir()
    assert stream_digest(_shards(copied, [4, 3])) == first, "wherever they lie"
    assert len(list((tmp_path / "cache" / "digests").iterdir())) == 4
    shard = folder / "s-0001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert stream_digest(items) != first


def test_an_image_without_a_file_cannot_be_streamed() -> None:
    item = Item(id="drawn", label=0, load=lambda: PIL.Image.new("RGB", (4, 4)))
    for reading in (lambda: stream_digest([item]), lambda: Stream("s", [item], SMALL)):
        with pytest.raises(ConfigError, match="the image drawn lies in no file to stream it from; leave --stream out"):
            reading()


# -- the curve of the losses


def test_a_curve_keeps_the_steps_before_a_resume_and_drops_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "new" / "curve.jsonl"
    curve = Curve(path, done=0)
    for step in range(5):
        curve.add(step, {"loss": step / 2})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    resumed = Curve(path, done=3)
    resumed.add(3, {"loss": 9.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [*({"step": step, "loss": step / 2} for step in range(3)), {"step": 3, "loss": 9.0}]
    Curve(path, done=0)
    assert path.read_text() == ""
