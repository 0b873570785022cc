"""The checks that attack again: whether someone who tries harder breaks what resisted everything in the audit.

They run with `--strict`, on a few samples of each victim at each budget. What they break changes no figure of the
audit; it becomes a finding that says which figure is too good.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pyarrow as pa
import torch

from robustbench_x.config import AttackConfig
from robustbench_x.diagnose import probe_gradient, probe_loss
from robustbench_x.encoders.encoder import features_of_looks
from robustbench_x.engine.craft import craft_rows
from robustbench_x.engine.handout import AttackAtWork
from robustbench_x.engine.stage import Batch, StageAtWork
from robustbench_x.findings import FINDINGS, finding
from robustbench_x.plan import UNDEFENDED, Cell, Craft
from robustbench_x.randomness import derive_seed
from robustbench_x.registry import Registry
from robustbench_x.result import Finding
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import Shield, fresh_draw, perceive
from robustbench_x.views import Knowledge

__all__ = ["strict_findings"]

_SAMPLES = 16
_QUERIES = 500
_DRAWS = 200
_STEPS = 20
_PROBED = 8
_UNBOUNDED = ThreatModel(norm="linf", eps=0.5)
_FIXED = 0.95
_GRADIENT = "pgd"
"""The registry's name for the plain gradient attack that the checks use; `square` and `random_search` likewise."""


def strict_findings(
    stage: StageAtWork, registry: Registry, rows: pa.Table, say: Callable[[str], None] = lambda text: None
) -> list[Finding]:
    """Findings about every victim of `stage` at every budget, from `rows` of the finished audit.

    Args:
        stage: The stage, its victims still loaded.
        registry: Where attacks are looked up.
        rows: Every row of the audit so far.
        say: Told what is being checked.
    """
    columns = {name: rows.column(name).to_numpy(zero_copy_only=False) for name in _COLUMNS}
    found: list[Finding] = []
    cells = [cell for craft in stage.stage.crafts for cell in craft.cells]
    victims = list(dict.fromkeys((cell.defense, cell.head, cell.threat) for cell in cells))
    for number, (defense, head, threat) in enumerate(victims):
        if threat.radius == 0:
            continue
        own = [cell for cell in cells if (cell.defense, cell.head, cell.threat) == (defense, head, threat)]
        harder = _Harder(
            stage=stage,
            registry=registry,
            head=head,
            defense=defense,
            threat=threat,
            cells=tuple(cell.id for cell in own),
            tried=_tried(stage, registry, own),
            standing=_standing(columns, own),
            correct=_correct(columns, own),
            number=-1 - number,
        )
        say(f"trying harder on {harder.where}")
        found += harder.findings()
    return found


_COLUMNS = ("cell", "position", "clean_correct", "fooled", "error")


def _of(columns: Mapping[str, np.ndarray], cells: Sequence[Cell]) -> np.ndarray:
    names = [cell.id for cell in cells]
    chosen: np.ndarray = np.flatnonzero(np.isin(columns["cell"], names))
    return chosen


def _correct(columns: Mapping[str, np.ndarray], cells: Sequence[Cell]) -> tuple[int, ...]:
    """Positions of the samples that are right when clean."""
    index = _of(columns, cells)
    right = np.array([bool(value) for value in columns["clean_correct"][index]])
    return tuple(sorted(set(columns["position"][index][right].tolist())))


def _standing(columns: Mapping[str, np.ndarray], cells: Sequence[Cell]) -> tuple[int, ...]:
    """Positions of the samples that are right when clean and that no attack broke."""
    index = _of(columns, cells)
    fell = np.array([bool(value) for value in columns["fooled"][index]])
    fallen = set(columns["position"][index][fell].tolist())
    return tuple(p for p in _correct(columns, cells) if p not in fallen)


def _tried(stage: StageAtWork, registry: Registry, cells: Sequence[Cell]) -> tuple[AttackConfig, ...]:
    """White-box attacks that this victim was attacked with, knowing its defence."""
    knew = {cell.attack for cell in cells if cell.knowledge in ("none", "full")}
    return tuple(
        entry
        for entry in stage.config.attack
        if entry.title in knew and registry.attacks[entry.name].access == "whitebox"
    )


def _spread(positions: Sequence[int]) -> tuple[int, ...]:
    """A few of `positions`, evenly spaced: data sets are often sorted by class."""
    count = min(len(positions), _SAMPLES)
    return tuple(positions[i * len(positions) // count] for i in range(count))


@final
@dataclass(frozen=True, kw_only=True)
class _Harder:
    """One victim at one budget, and everything that is tried on it again."""

    stage: StageAtWork
    registry: Registry
    head: str
    defense: str
    threat: ThreatModel
    cells: tuple[str, ...]
    tried: tuple[AttackConfig, ...]
    standing: tuple[int, ...]
    correct: tuple[int, ...]
    number: int

    @property
    def where(self) -> str:
        """The victim, as findings name it."""
        stage = self.stage.stage
        return f"{stage.encoder} | {self.head} | {stage.data} | {self.defense} | worst_case | {self.threat}"

    @property
    def shield(self) -> Shield | None:
        """The defence."""
        return self.stage.shields[self.defense]

    def findings(self) -> list[Finding]:
        """What every check comes to; one that fails is a finding of its own."""
        checks: list[tuple[str, Callable[[], list[Finding]]]] = [
            ("unstable_loss", self._jumps),
            ("unbounded_fails", self._unbounded),
            ("more_iterations_break", lambda: self._doubled("steps", "more_iterations_break")),
            ("more_restarts_break", lambda: self._doubled("restarts", "more_restarts_break")),
            ("single_step_wins", self._single_step),
            ("black_box_wins", lambda: self._by_queries("square", _QUERIES, "black_box_wins")),
            ("random_search_wins", lambda: self._by_queries("random_search", _DRAWS, "random_search_wins")),
        ]
        if self.shield is not None and self.shield.spec.stochastic:
            checks += [
                ("more_draws_break", lambda: self._doubled("eot", "more_draws_break")),
                ("randomness_carries", self._fixed_draw),
            ]
        found = []
        for name, check in checks:
            try:
                results = check()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it becomes an error-level finding
                text = f"{name}: {type(error).__name__}: {error}"
                results = [finding("strict_check_failed", text)]
            found += [f.model_copy(update={"cell": self.where, "applies_to": self.cells}) for f in results]
        return found

    def _jumps(self) -> list[Finding]:
        """Whether the loss that white-box attacks follow jumps around the images."""
        chosen = self.correct[:_PROBED]
        if not chosen:
            return []
        through = perceive(self.shield, "full")
        encoder, head = self.stage.body(self.head), self.stage.heads[self.head]

        def see(images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = head(features_of_looks(encoder, through(images)))
            return logits

        images = self._batch(chosen).images
        exact = self.shield is None or (self.shield.spec.gradient == "exact" and not self.shield.spec.stochastic)
        with fresh_draw(derive_seed(self.stage.seed, "jumps"), self.stage.device):
            doubts = probe_gradient(images, see, self.threat, loss="margin", honest=exact)
            labels = self.stage.labels[self.head][list(chosen)]
            return probe_loss(images, see, labels, honest=exact and not doubts)

    def _unbounded(self) -> list[Finding]:
        """Whether anything survives a budget at which every image can be made grey; a detector may well refuse grey."""
        chosen = _spread(self.correct)
        if not chosen or (self.shield is not None and self.shield.spec.detects):
            return []
        fooled = self._fooled(_GRADIENT, {"steps": 2 * _STEPS}, chosen, threat=_UNBOUNDED)
        left = 1 - sum(fooled) / len(fooled)
        head = self.stage.heads[self.head]
        labels = self.stage.labels[self.head][list(chosen)].tolist()
        chance = max(max(labels.count(label) for label in set(labels)) / len(labels), 1 / head.num_classes)
        # One class for all images keeps those of that class right, and that is no robustness.
        if left <= chance:
            return []
        text = f"{left:.0%} of {len(chosen)} samples resist linf 0.5; one class for all would keep {chance:.0%} right"
        return [finding("unbounded_fails", text, figure=left)]

    def _doubled(self, parameter: str, kind: str) -> list[Finding]:
        """The attacks of the audit with twice as much of one parameter."""
        found = []
        for entry in self.tried:
            spec = self.registry.attacks[entry.name]
            if parameter not in {p.name for p in spec.params}:
                continue
            value = spec.effective(entry.params)[parameter]
            if isinstance(value, int):
                params = {**entry.params, parameter: 2 * value}
                found += self._broken(kind, entry.name, params, f"{entry.title} with {parameter}={2 * value}")
        return found

    def _single_step(self) -> list[Finding]:
        params = {"steps": 1, "step_size": self.threat.radius, "random_start": False}
        return self._broken("single_step_wins", _GRADIENT, params, "one step of the gradient's sign")

    def _by_queries(self, name: str, queries: int, kind: str) -> list[Finding]:
        if self.shield is not None and self.shield.spec.detects:
            return []  # a query attack does not know how to evade
        return self._broken(kind, name, {"queries": queries}, f"{name} with {queries} queries")

    def _fixed_draw(self) -> list[Finding]:
        """Whether the attack wins at least when the defence's randomness is known and stands still."""
        shield, chosen = self.shield, _spread(self.correct)
        assert shield is not None, "a random defence"
        if not chosen:
            return []
        still = dataclasses.replace(
            shield,
            spec=dataclasses.replace(shield.spec, stochastic=False),
            defense=_Still(shield.defense, derive_seed(self.stage.seed, "still"), self.stage.device),
        )
        with _replaced(self.stage.shields, self.defense, still):
            rows = self._rows(_GRADIENT, {"steps": 2 * _STEPS}, chosen, fresh=True)
        # Some that most draws get right are wrong on this one, attacked or not.
        fooled = [bool(row["fooled"]) for row in rows if row["clean_correct"]]
        if not fooled or (won := sum(fooled) / len(fooled)) >= _FIXED:
            return []
        text = f"with one draw fixed, {won:.0%} of {len(fooled)} correct samples fall"
        return [finding("randomness_carries", text, figure=won)]

    def _broken(self, kind: str, name: str, params: Mapping[str, Any], words: str) -> list[Finding]:
        """The finding `kind`, where the attack breaks a large enough share of the correct samples that had resisted."""
        chosen = _spread(self.standing)
        if not chosen:
            return []
        fell = sum(self._fooled(name, params, chosen))
        # Only part of what resisted was tried: the share is scaled up to all of it.
        share = fell / len(chosen) * len(self.standing) / len(self.correct)
        limit = FINDINGS[kind].threshold or 0.0
        if not fell or share <= limit:
            return []
        text = f"{words} breaks {fell} of {len(chosen)} samples that had resisted every attack"
        return [finding(kind, text, figure=share)]

    def _fooled(
        self,
        name: str,
        params: Mapping[str, Any],
        positions: Sequence[int],
        *,
        threat: ThreatModel | None = None,
    ) -> list[bool]:
        """Whether the attack `name`, knowing the defence, breaks each of the samples at `positions`.

        Raises:
            RuntimeError: A sample could not be judged.
        """
        if (threat or self.threat).norm not in self.registry.attacks[name].norms:
            return [False] * len(positions)
        return [bool(row["fooled"]) for row in self._rows(name, params, positions, threat=threat)]

    def _rows(
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
        batch = self._batch(positions)
        if fresh:
            self.stage.forget(batch)
        rows = craft_rows(self.stage, work, batch, self.stage.config, slice(0, len(batch.images)))
        if fresh:
            self.stage.forget(batch)
        errors = [row["error"] for row in rows if row.get("error") is not None]
        if errors:
            raise RuntimeError(errors[0])
        return rows

    def _batch(self, positions: Sequence[int]) -> Batch:
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
class _Still:
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
def _replaced(held: dict[str, Shield | None], name: str, value: Shield) -> Iterator[None]:
    """One entry of a dict replaced for a while."""
    before = held[name]
    held[name] = value
    try:
        yield
    finally:
        held[name] = before
