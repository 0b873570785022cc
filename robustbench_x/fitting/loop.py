"""The training loop: batches by seed, checkpoints by time, progress with the loss terms."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from robustbench_x.encoders.encoder import state_sha256
from robustbench_x.errors import SampleError
from robustbench_x.fitting.artifact import write_tensors
from robustbench_x.plugin import Trainer
from robustbench_x.randomness import derive_seed
from robustbench_x.victim import fresh_draw
from robustbench_x.views import Meter

__all__ = ["Trained", "batch_index", "run_training"]

_SHOW_SECONDS = 0.5

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
) -> Trained:
    """Runs a training to its end, from its last checkpoint where there is one of the same `key`.

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

    Raises:
        SampleError: A loss term is not finite, or the method needs surrogate images and there is none.
    """
    started = time.perf_counter()
    place = device or torch.device("cpu")
    with fresh_draw(derive_seed(seed, "make"), place):
        trainer = make()
    if trainer.batch and not pool:
        raise SampleError("the training needs surrogate images and there is none")
    done, before = _resume(trainer, checkpoint, key)
    # What a trainer computes once at its start is paid anew at every sitting, and counted once.
    base = (meter.forwards, meter.backwards) if done else (0, 0)
    terms: Mapping[str, Tensor] = {}
    saved = time.perf_counter()
    shown = 0.0

    def cost() -> _Cost:
        return _Cost(
            before.seconds + time.perf_counter() - started,
            before.forwards + meter.forwards - base[0],
            before.backwards + meter.backwards - base[1],
        )

    for number in range(done, trainer.steps):
        index = batch_index(number, batch=trainer.batch, pool=pool, seed=seed)
        # A random defence, or a plugin that knows only the global generator: the same draws after any resume.
        with fresh_draw(derive_seed(seed, "step", number), place):
            terms = trainer.step(number, index)
        now = time.perf_counter()
        last = number + 1 == trainer.steps
        if last or now - shown > _SHOW_SECONDS:
            losses = _checked(terms, number)
            shown = now
            if show:
                show(number + 1, trainer.steps, losses)
        if checkpoint is not None and (last or now - saved > every):
            _save(checkpoint, trainer, number + 1, cost(), _checked(terms, number), key)
            saved = now
    spent = cost()
    losses = _checked(terms, trainer.steps) if terms else _stored_losses(checkpoint)
    return Trained(trainer.result(), losses, trainer.steps, spent.seconds, spent.forwards, spent.backwards)


def _checked(terms: Mapping[str, Tensor], number: int) -> dict[str, float]:
    losses = {name: float(value) for name, value in terms.items()}
    broken = [name for name, value in losses.items() if not math.isfinite(value)]
    if broken:
        raise SampleError(f"the training broke down: {broken[0]} is {losses[broken[0]]} at step {number}")
    return losses


def _save(path: Path, trainer: Trainer, done: int, cost: _Cost, losses: dict[str, float], key: str) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.state().items()}
    note = {"key": key, "done": done, "cost": list(cost), "losses": losses, "sha256": state_sha256(state)}
    write_tensors(path, state, {"note": json.dumps(note)})


def _resume(trainer: Trainer, path: Path | None, key: str) -> tuple[int, _Cost]:
    """Steps done and what they cost; the trainer stands there afterwards."""
    if path is None or not path.is_file():
        return 0, _Cost()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})["note"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no Mapping
    except (safetensors.SafetensorError, KeyError, ValueError):
        return 0, _Cost()
    if note.get("key") != key or note.get("sha256") != state_sha256(state):
        return 0, _Cost()
    trainer.restore(state)
    return int(note["done"]), _Cost(*note["cost"])


def _stored_losses(path: Path | None) -> dict[str, float]:
    if path is None or not path.is_file():  # a training of no steps has neither losses nor a checkpoint
        return {}
    with safetensors.safe_open(path, framework="pt") as file:
        losses: dict[str, float] = json.loads((file.metadata() or {})["note"])["losses"]
    return losses
