"""The training loop: batches by seed, checkpoints by time, progress with the loss terms."""

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import safetensors
import torch
from torch import Tensor

from robustbench_x.encoders.encoder import state_sha256
from robustbench_x.errors import SampleError
from robustbench_x.fitting.artifact import write_tensors
from robustbench_x.fitting.curve import Curve
from robustbench_x.fitting.stream import Stream
from robustbench_x.plugin import Trainer
from robustbench_x.randomness import derive_seed
from robustbench_x.victim import fresh_draw
from robustbench_x.views import Meter
from robustbench_x.world import SINGLE, World

__all__ = ["Trained", "batch_index", "run_training"]

_SHOW_SECONDS = 0.5
_AHEAD = 3
"""Batches of a stream that are decoded or being decoded when a step begins, its own among them."""

Show = Callable[[int, int, Mapping[str, float]], None]
"""Told the steps done, the steps in all, and the loss terms."""


class Trained(NamedTuple):
    """What came of a training: its result, the last loss terms, and its whole cost over every sitting."""

    tensors: dict[str, Tensor]
    losses: dict[str, float]
    steps: int
    seconds: float
    forwards: int
    backwards: int
    lost: Mapping[int, str] = {}
    """Images of a stream that could not be read, with the reason."""


class _Cost(NamedTuple):
    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0


def batch_index(number: int, *, batch: int, pool: int, seed: int) -> Tensor:
    """The surrogate images of step `number`, `(batch,)`: the pool in a new order each time it is through."""
    if not batch:
        return torch.empty(0, dtype=torch.long)
    start = number * batch
    wanted: list[int] = []
    while len(wanted) < batch:
        epoch, offset = divmod(start + len(wanted), pool)
        order = torch.randperm(pool, generator=torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch)))
        wanted += order[offset : offset + batch - len(wanted)].tolist()
    return torch.tensor(wanted, dtype=torch.long)


def run_training(
    make: Callable[[], Trainer],
    *,
    pool: int,
    seed: int,
    meter: Meter,
    device: torch.device | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    every: float = 20.0,
    show: Show | None = None,
    stream: Stream | None = None,
    world: World = SINGLE,
    losses_to: Path | None = None,
) -> Trained:
    """Runs a training to its end, from its last checkpoint where there is one of the same `key`.

    Of several processes the first alone reads and writes files and is told about progress.

    Args:
        make: The trainer at its start.
        pool: Number of surrogate images.
        seed: Decides the batches.
        meter: Counts what the trainer sends through the encoders.
        device: Whose global generator is seeded anew for every step, beside the CPU's.
        checkpoint: Where the state is kept; removed by whoever stores the result. None keeps none.
        key: What the training is of; a checkpoint of another key, or a damaged one, counts as absent.
        every: Seconds between checkpoints.
        show: Told about progress, a few times a second.
        stream: The surrogate images where they stay in their files; decides their order.
        world: The processes that share it.
        losses_to: A file for the loss terms of every step; see `Curve`.

    Raises:
        SampleError: A loss term is not finite, or the method needs surrogate images and there is none.
    """
    started = time.perf_counter()
    place = device or torch.device("cpu")
    with fresh_draw(derive_seed(seed, "make"), place):
        trainer = make()
    if trainer.batch and not pool:
        raise SampleError("the training needs surrogate images and there is none")
    books = _Books(checkpoint, key, meter, stream, world)
    done = books.open(trainer, started)
    mine = world.rows(trainer.batch)
    curve = Curve(losses_to, done=done) if losses_to is not None and world.rank == 0 else None
    terms: Mapping[str, Tensor] = {}
    saved = time.perf_counter()
    shown = 0.0

    def images_of(number: int) -> Tensor:
        if stream is not None:
            return stream.index(number, batch=trainer.batch, seed=seed)
        return batch_index(number, batch=trainer.batch, pool=pool, seed=seed)

    for number in range(done, trainer.steps):
        if stream is not None:  # the next batches are decoded during this step
            for later in range(number if number == done else number + _AHEAD - 1, min(number + _AHEAD, trainer.steps)):
                stream.expect(images_of(later)[mine])
        # A random defence, or a plugin that knows only the global generator: the same draws after any resume.
        with fresh_draw(derive_seed(seed, "step", number), place):
            terms = trainer.step(number, images_of(number))
        now = time.perf_counter()
        last = number + 1 == trainer.steps
        if curve is not None:
            curve.add(number, _checked(terms, number))
        if last or now - shown > _SHOW_SECONDS:
            losses = _checked(terms, number)
            shown = now
            if show and world.rank == 0:
                show(number + 1, trainer.steps, losses)
        if checkpoint is not None and world.told(last or now - saved > every):
            books.save(trainer, number + 1, _checked(terms, number))
            saved = time.perf_counter()
    spent, lost = books.totals()
    losses = _checked(terms, trainer.steps) if terms else books.losses
    return Trained(trainer.result(), losses, trainer.steps, spent.seconds, spent.forwards, spent.backwards, lost)


@final
class _Books:
    """The checkpoint, and what the training has cost over all sittings and processes."""

    def __init__(self, path: Path | None, key: str, meter: Meter, stream: Stream | None, world: World) -> None:
        self._path, self._key, self._meter, self._world = path, key, meter, world
        self._lost: dict[int, str] = {} if stream is None else stream.lost
        self._before, self._base, self._started = _Cost(), (0, 0), 0.0
        self.losses: dict[str, float] = {}
        """Of the step that the checkpoint was read at."""

    def open(self, trainer: Trainer, started: float) -> int:
        """Steps done; the trainer stands there afterwards."""
        self._started = started
        found = self._world.told(self._read() if self._world.rank == 0 else None)
        if found is None:
            return 0
        note, state = found
        trainer.restore(state)
        self.losses = note["losses"]
        self._before = _Cost(*note["cost"])
        # What a trainer computes once at its start is paid anew at every sitting, and counted once.
        self._base = self._meter.forwards, self._meter.backwards
        self._lost.update({int(number): reason for number, reason in note["lost"].items()})
        return int(note["done"])

    def totals(self) -> tuple[_Cost, dict[int, str]]:
        """The cost so far, and what could not be read."""
        own = self._meter.forwards - self._base[0], self._meter.backwards - self._base[1], dict(self._lost)
        forwards, backwards, lost = zip(*self._world.collect(own), strict=True)
        before = self._before
        cost = _Cost(
            before.seconds + time.perf_counter() - self._started,
            before.forwards + sum(forwards),
            before.backwards + sum(backwards),
        )
        return cost, dict(sorted(itertools.chain.from_iterable(part.items() for part in lost)))

    def save(self, trainer: Trainer, done: int, losses: dict[str, float]) -> None:
        """Writes the checkpoint."""
        cost, lost = self.totals()
        if self._world.rank or self._path is None:
            return
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.state().items()}
        note = {
            "key": self._key, "done": done, "cost": list(cost), "losses": losses, "lost": lost,
            "sha256": state_sha256(state),
        }  # fmt: skip
        write_tensors(self._path, state, {"note": json.dumps(note)})

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if self._path is None or not self._path.is_file():
            return None
        try:
            with safetensors.safe_open(self._path, framework="pt") as file:
                note = json.loads((file.metadata() or {})["note"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no Mapping
        except (safetensors.SafetensorError, KeyError, ValueError):
            return None
        return (note, state) if note.get("key") == self._key and note.get("sha256") == state_sha256(state) else None


def _checked(terms: Mapping[str, Tensor], number: int) -> dict[str, float]:
    losses = {name: float(value) for name, value in terms.items()}
    broken = [name for name, value in losses.items() if not math.isfinite(value)]
    if broken:
        raise SampleError(f"the training broke down: {broken[0]} is {losses[broken[0]]} at step {number}")
    return losses
