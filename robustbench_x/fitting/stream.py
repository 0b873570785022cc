"""Surrogate images that stay in their files: read shard by shard in a seeded order, decoded ahead by threads."""

import functools
import hashlib
import itertools
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_x.cache import cache_dir
from robustbench_x.data.dataset import Item
from robustbench_x.encoders.encoder import Preprocessing
from robustbench_x.errors import ConfigError, DataError
from robustbench_x.randomness import derive_seed

__all__ = ["Stream", "StreamOrder", "StreamedImages", "stream_digest"]

_WINDOW = 5000
_TRIES = 100
_EXPECTED = 6
"""Batches that are held at most for someone who said they would ask for them: the pool's bound on memory."""
_THREADS = 8
_BLOCK = 1 << 20


class _Epoch(NamedTuple):
    shards: NDArray[np.int64]
    """In the order of this epoch."""
    cuts: list[int]
    """Places in `shards` where windows begin, and the end."""
    tops: NDArray[np.int64]
    """Images up to the end of each window."""


@final
class StreamOrder:
    """Which images each step sees: every one once an epoch, neighbours in a file near each other in time.

    The shards of an epoch come in an order of their own; enough of them in a row to hold `window` images are a window,
    whose images are mixed. All follows from the seed and the number of the step alone. Where every image is a file of
    its own, that is a plain shuffle.

    Args:
        lengths: Images of each shard; those of a shard have neighbouring numbers.
        window: Images that are mixed at least, but at the end of an epoch (the published loop's shuffle buffer: 5000).
    """

    def __init__(self, lengths: Sequence[int], *, window: int = _WINDOW) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._window = window
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        self._mixed = functools.lru_cache(maxsize=3)(self._make_mixed)

    def index(self, number: int, *, batch: int, seed: int) -> Tensor:
        """The images of step `number`, `(batch,)`."""
        total, start = int(self._starts[-1]), number * batch
        parts: list[Tensor] = []
        while (have := sum(map(len, parts))) < batch:
            epoch, offset = divmod(start + have, total)
            tops = self._epoch(seed, epoch).tops
            window = int(np.searchsorted(tops, offset, side="right"))
            offset -= int(tops[window - 1]) if window else 0
            parts.append(self._mixed(seed, epoch, window)[offset : offset + batch - have])
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)

    def _make_epoch(self, seed: int, epoch: int) -> _Epoch:
        generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
        shards = torch.randperm(len(self._lengths), generator=generator).numpy()
        ends = np.cumsum(self._lengths[shards])
        cuts = [0]
        while cuts[-1] < len(shards):
            begun = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
            cuts.append(min(int(np.searchsorted(ends, begun + self._window)) + 1, len(shards)))
        return _Epoch(shards, cuts, ends[np.asarray(cuts[1:]) - 1])

    def _make_mixed(self, seed: int, epoch: int, window: int) -> Tensor:
        shards, cuts, _ = self._epoch(seed, epoch)
        chosen = shards[cuts[window] : cuts[window + 1]]
        images = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in chosen])
        generator = torch.Generator().manual_seed(derive_seed(seed, "window", epoch, window))
        return torch.from_numpy(images)[torch.randperm(len(images), generator=generator)]


@final
class Stream:
    """Images of one size that are decoded when asked for, ahead of that where they are expected.

    In the place of an image that cannot be read comes the next one that can; `lost` has the numbers of the former, with
    the reason, as far as they were met.

    Args:
        source: For messages.
        items: The images, those of one file next to each other; a number is a place in here.
        preprocessing: Makes the pixels.
        window: See `StreamOrder`.
        threads: That decode; None for one a core, 8 at most.
    """

    def __init__(
        self,
        source: str,
        items: Sequence[Item],
        preprocessing: Preprocessing,
        *,
        window: int = _WINDOW,
        threads: int | None = None,
    ) -> None:
        self.lost: dict[int, str] = {}
        self._source, self._items, self._preprocessing = source, items, preprocessing
        self._order = StreamOrder([len(list(run)) for _, run in itertools.groupby(items, _place)], window=window)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(threads or min(cores, _THREADS), thread_name_prefix="rbx-decode")
        self._expected: deque[dict[int, Future[Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def index(self, number: int, *, batch: int, seed: int) -> Tensor:
        """The images of step `number`; see `StreamOrder`."""
        return self._order.index(number, batch=batch, seed=seed)

    def expect(self, index: Tensor) -> None:
        """Begins to decode what will be asked for soon; of what nobody asks for, the oldest is dropped."""
        while len(self._expected) >= _EXPECTED:
            for future in self._expected.popleft().values():
                future.cancel()
        held = set(itertools.chain.from_iterable(self._expected))
        wanted = [i for i in dict.fromkeys(index.tolist()) if i not in held]
        self._expected.append({i: self._threads.submit(self._decode, i) for i in wanted})

    def levels(self, index: Tensor) -> Tensor:
        """`(len(index), 3, H, W)` uint8 of the images at `index`.

        Raises:
            DataError: A hundred images in a row cannot be read.
        """
        numbers = index.tolist()
        found = {i: self._claim(i) for i in dict.fromkeys(numbers)}
        return torch.stack([found[i].result() for i in numbers])

    def _claim(self, number: int) -> Future[Tensor]:
        for batch in self._expected:
            if number in batch:
                return batch.pop(number)
        return self._threads.submit(self._decode, number)

    def _decode(self, number: int) -> Tensor:
        tries = min(_TRIES, len(self))
        for place in (i % len(self) for i in range(number, number + tries)):
            if place in self.lost:
                continue
            try:
                return self._preprocessing(self._items[place].load()).mul(255).round().to(torch.uint8)
            except DataError as error:
                self.lost[place] = str(error)
        reason = self.lost[number]
        raise DataError(f"surrogate {self._source}: {tries} images in a row cannot be read, the first because {reason}")


@final
class StreamedImages:
    """A stream as a plugin is handed it: pixels on a device."""

    def __init__(self, stream: Stream, *, device: torch.device | str = "cpu") -> None:
        self._stream = stream
        self._device = torch.device(device)

    def __len__(self) -> int:
        return len(self._stream)

    def batch(self, index: Tensor) -> Tensor:
        """See `robustbench_x.views.Images`."""
        return self._stream.levels(index).to(self._device, non_blocking=True).float().div(255)

    def expect(self, index: Tensor) -> None:
        """See `robustbench_x.views.Images`."""
        self._stream.expect(index)


def stream_digest(items: Sequence[Item]) -> str:
    """A digest of what `items` are without decoding them: their ids, and the content of the files they lie in.

    The digest of a shard is kept in the cache, under its path, size and time of change.

    Raises:
        ConfigError: An image lies in no file.
    """
    counts = Counter(_place(item) for item in items)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as threads:
        for path, content in zip(counts, threads.map(_file_digest, counts, _kept(counts)), strict=True):
            digest.update(f"{path.name}:{content}\n".encode())
    for item in items:
        digest.update(f"{item.id}\n".encode())
    return digest.hexdigest()


def _place(item: Item) -> Path:
    if item.file is None:
        raise ConfigError(f"the image {item.id} lies in no file to stream it from; leave --stream out")
    return item.file


def _kept(counts: Mapping[Path, int]) -> Iterator[bool]:
    return (count > 1 for count in counts.values())


def _file_digest(path: Path, kept: bool) -> str:
    """Of the content, from the cache where `kept` is set; `unreadable` for a file that cannot be read."""
    try:
        status = path.stat()
        note = cache_dir() / "digests" / hashlib.sha256(str(path).encode()).hexdigest()
        known = f"{status.st_size} {status.st_mtime_ns} "
        if kept and note.is_file() and (text := note.read_text(encoding="ascii")).startswith(known):
            return text.removeprefix(known)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if kept:
            note.parent.mkdir(parents=True, exist_ok=True)
            temporary = note.with_name(f".{note.name}-{os.getpid()}.tmp")
            temporary.write_text(known + digest.hexdigest(), encoding="ascii")
            temporary.replace(note)
        return digest.hexdigest()
    except OSError:
        return "unreadable"
