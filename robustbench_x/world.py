"""The processes that share one training: one of many under `torchrun`, or the only one.

Gathering is exact in autograd: where every process computes the same loss of gathered rows, and the gradients of the
weights are averaged over the processes, they are those of one process with the whole batch.
"""

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, final

import torch
from torch import Tensor

from robustbench_x.errors import ConfigError, MissingExtraError

__all__ = ["SINGLE", "Single", "Torchrun", "World", "leads", "open_world", "processes", "share"]

T = TypeVar("T")

_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")


class World(Protocol):
    """A training's processes, seen from one of them; every method but `rows` is called by all of them alike."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def rows(self, count: int) -> slice:
        """This process's part of a batch of `count` rows.

        Raises:
            ConfigError: The processes cannot have equal parts.
        """

    def gather(self, rows: Tensor) -> Tensor:
        """`rows` `(N, ...)` of every process in turn, `(size * N, ...)`, with gradients, summed over the processes."""

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, in place."""

    def told(self, value: T) -> T:
        """What the first process passed, for everybody: any object that can be pickled."""

    def collect(self, value: T) -> list[T]:
        """What every process passed, by rank."""


@final
class Single:
    """The only process."""

    rank = 0
    size = 1

    def rows(self, count: int) -> slice:
        """All of them."""
        return slice(0, count)

    def gather(self, rows: Tensor) -> Tensor:
        """`rows`."""
        return rows

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def told(self, value: T) -> T:
        """`value`."""
        return value

    def collect(self, value: T) -> list[T]:
        """`[value]`."""
        return [value]


SINGLE = Single()


@final
class Torchrun:
    """One of the processes that `torchrun` started, joined by Lightning Fabric: NCCL between GPUs, else gloo.

    Args:
        device: `cpu`, or any CUDA device: then each process takes the one of its local rank.

    Raises:
        MissingExtraError: Lightning Fabric is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its namespace package, where other parts of Lightning are absent
                from lightning_fabric import Fabric
        except ModuleNotFoundError as error:
            if error.name is not None and not error.name.startswith("lightning"):
                raise
            raise MissingExtraError(
                "a training on several processes", package="lightning-fabric", extra="scale"
            ) from error
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        # Its gather rests on a function of torch that newer versions warn about, at every call.
        warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional", module=r"lightning_fabric\.")
        self._fabric: Any = Fabric(
            accelerator="cuda" if device.type == "cuda" else "cpu",
            devices=local,
            num_nodes=int(os.environ["WORLD_SIZE"]) // local,
            strategy="ddp",
        )
        self._fabric.launch()
        self.rank: int = self._fabric.global_rank
        self.size: int = self._fabric.world_size
        self.device: torch.device = self._fabric.device

    def rows(self, count: int) -> slice:
        """See `World`."""
        return share(count, self.rank, self.size)

    def gather(self, rows: Tensor) -> Tensor:
        """See `World`."""
        gathered: Tensor = self._fabric.all_gather(rows, sync_grads=rows.requires_grad and torch.is_grad_enabled())
        return gathered.flatten(0, 1)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """See `World`; one exchange for all of them."""
        if not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        mean: Tensor = self._fabric.all_reduce(flat, reduce_op="mean")
        parts = torch.split(mean, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def told(self, value: T) -> T:
        """See `World`."""
        found: T = self._fabric.broadcast(value, src=0)
        return found

    def collect(self, value: T) -> list[T]:
        """See `World`."""
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found


def share(count: int, rank: int, size: int) -> slice:
    """The part of a batch of `count` rows that process `rank` of `size` takes.

    Raises:
        ConfigError: The parts would not be equal.
    """
    if count % size:
        raise ConfigError(f"a batch of {count} cannot be shared equally by {size} processes; change either")
    part = count // size
    return slice(rank * part, (rank + 1) * part)


def processes() -> int:
    """How many processes `torchrun` started; 1 where it was not used."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _RANK) else 1


def leads() -> bool:
    """Whether this process is the only one or the first of `torchrun`'s: the one that speaks and writes."""
    return processes() == 1 or os.environ["RANK"] == "0"


def open_world(device: torch.device) -> Single | Torchrun:
    """The processes of this training: `torchrun`'s, or this one alone.

    Raises:
        MissingExtraError: There are several, and Lightning Fabric is not installed.
    """
    return Torchrun(device) if processes() > 1 else SINGLE
