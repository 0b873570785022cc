"""A victim attacked once more on chosen samples: what the checks that try harder are made of."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch

from robustbench_x.config import AttackConfig
from robustbench_x.engine.craft import craft_rows
from robustbench_x.engine.handout import AttackAtWork
from robustbench_x.engine.stage import Batch, StageAtWork
from robustbench_x.plan import UNDEFENDED, Cell, Craft
from robustbench_x.randomness import derive_seed
from robustbench_x.registry import Registry
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import Shield, fresh_draw
from robustbench_x.views import Knowledge

__all__ = ["NotRun", "Retrial", "Still", "replaced"]


class NotRun(Exception):  # noqa: N818 - no error: it says why a check has nothing to say
    """A check does not apply here; `mendable` where another audit could have had it."""

    def __init__(self, reason: str, *, mendable: bool = False) -> None:
        super().__init__(reason)
        self.mendable = mendable


@final
@dataclass(frozen=True, kw_only=True)
class Retrial:
    """One victim at one budget, to be attacked by someone who knows its defence; `number` tells it from others."""

    stage: StageAtWork
    registry: Registry
    head: str
    defense: str
    threat: ThreatModel
    number: int

    def fooled(
        self, name: str, params: Mapping[str, Any], positions: Sequence[int], *, threat: ThreatModel | None = None
    ) -> list[bool]:
        """Whether the attack `name`, knowing the defence, breaks each of the samples at `positions`.

        Raises:
            NotRun: The attack does not have the norm.
            RuntimeError: A sample could not be judged.
        """
        norm = (threat or self.threat).norm
        if norm not in self.registry.attacks[name].norms:
            raise NotRun(f"{name} has no norm {norm}")
        return [bool(row["fooled"]) for row in self.rows(name, params, positions, threat=threat)]

    def rows(
        self,
        name: str,
        params: Mapping[str, Any],
        positions: Sequence[int],
        *,
        threat: ThreatModel | None = None,
        fresh: bool = False,
    ) -> list[dict[str, Any]]:
        """The rows of the attack `name` on the samples at `positions`; `fresh` forgets how they are read when clean."""
        spec = self.registry.attacks[name]
        threat = threat or self.threat
        knowledge: Knowledge = "none" if self.defense == UNDEFENDED else "full"
        entry = AttackConfig(name=name, label=f"strict:{name}", **params)
        cell = Cell(
            encoder=self.stage.stage.encoder,
            head=self.head,
            data=self.stage.stage.data,
            defense=self.defense,
            knowledge=knowledge,
            attack=entry.title,
            threat=threat,
        )
        craft = Craft(
            attack=entry,
            threat=threat,
            head=self.head,
            seen=self.defense,
            knowledge=knowledge,
            # Whoever leaves the batch would shift the draws of those who stay.
            exhaustive=fresh,
            cells=(cell,),
        )
        work = AttackAtWork(craft=craft, spec=spec, attack=spec.build(params), surrogate=None)
        batch = self.batch(positions)
        if fresh:
            self.stage.forget(batch)
        rows = craft_rows(self.stage, work, batch, self.stage.config, slice(0, len(batch.images)))
        if fresh:
            self.stage.forget(batch)
        errors = [row["error"] for row in rows if row.get("error") is not None]
        if errors:
            raise RuntimeError(errors[0])
        return rows

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at `positions` as a batch of their own."""
        stage = self.stage
        picked: dict[int, tuple[torch.Tensor, str]] = {}
        for number in range(stage.num_batches):
            batch = stage.batch(number)
            for place, position in enumerate(batch.positions):
                if position in positions:
                    picked[position] = (batch.images[place], batch.digests[place])
        # A number of its own for these very samples, so that clean features are never those of others.
        number = -1 - derive_seed("strict", self.number, *positions)
        return Batch(
            number=number,
            images=torch.stack([picked[p][0] for p in positions]),
            items=tuple(stage.items[p] for p in positions),
            positions=tuple(positions),
            digests=tuple(picked[p][1] for p in positions),
            unreadable={},
        )


@final
@dataclass(frozen=True)
class Still:
    """A random defence whose draw is always the same."""

    defense: Any
    seed: int
    device: torch.device

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """The images of that draw."""
        with fresh_draw(self.seed, self.device):
            out: torch.Tensor = self.defense.apply(images)
        return out

    def stand_in(self, images: torch.Tensor) -> torch.Tensor:
        """The stand-in of that draw."""
        with fresh_draw(self.seed, self.device):
            out: torch.Tensor = self.defense.stand_in(images)
        return out


@contextmanager
def replaced(held: dict[str, Shield | None], name: str, value: Shield) -> Iterator[None]:
    """One entry of a dict replaced for a while."""
    before = held[name]
    held[name] = value
    try:
        yield
    finally:
        held[name] = before
