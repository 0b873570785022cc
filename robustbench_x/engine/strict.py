"""The checks that attack again: whether someone who tries harder breaks what resisted everything in the audit.

They run with `--strict`, on a few samples of each victim at each budget. What they break changes no figure of the
audit; it becomes a finding that says which figure is too good. A check that cannot run is a finding as well: who asked
for all of them must not take its silence for an answer.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pyarrow as pa
import torch

from robustbench_x.config import AttackConfig
from robustbench_x.diagnose import probe_gradient, probe_loss
from robustbench_x.encoders.encoder import features_of_looks
from robustbench_x.engine.handout import unwatched
from robustbench_x.engine.retrial import NotRun, Retrial, Still, replaced
from robustbench_x.engine.stage import StageAtWork
from robustbench_x.findings import FINDINGS, finding
from robustbench_x.plan import Cell
from robustbench_x.randomness import derive_seed
from robustbench_x.registry import Registry
from robustbench_x.result import Finding, Level
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import Shield, fresh_draw, perceive

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
        own = [cell for cell in cells if (cell.defense, cell.head, cell.threat) == (defense, head, threat)]
        harder = _Harder(
            again=Retrial(
                stage=stage, registry=registry, head=head, defense=defense, threat=threat, number=-1 - number
            ),
            cells=tuple(cell.id for cell in own),
            tried=_tried(stage, registry, own),
            standing=_standing(columns, own),
            correct=_correct(columns, own),
        )
        say(f"trying harder on {harder.where}")
        found += harder.findings()
        if threat.radius > 0:
            found += _unwatched(stage, registry, columns, own, harder.where)
    return found


_COLUMNS = ("cell", "position", "clean_correct", "fooled", "seen_fooled", "late_gain", "error")


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


def _unwatched(
    stage: StageAtWork,
    registry: Registry,
    columns: Mapping[str, np.ndarray],
    cells: Sequence[Cell],
    where: str,
) -> list[Finding]:
    """Attacks on this victim of which nobody could say what they were answered, and why."""
    blind: dict[tuple[str, str, Level], list[Cell]] = {}
    for craft in stage.stage.crafts:
        # Only who attacks this very victim is answered by it.
        met = [cell for cell in craft.cells if cell in cells and cell.defense == craft.seen]
        access = registry.attacks[craft.attack.name].access
        if not met or craft.head is None or access in ("none", "encoder"):
            continue
        why = unwatched(stage, craft)
        if why is not None:
            level: Level = "warning" if why.mendable else "note"
            blind.setdefault(("silent_success, unconverged", why.reason, level), []).extend(met)
        elif access == "whitebox" and _too_short(columns, met):
            few = "fewer than twenty looks at the victim, too few to see a trend"
            blind.setdefault(("unconverged", few, "note"), []).extend(met)
    return [
        _not_run(f"{checks} ({', '.join(dict.fromkeys(cell.attack for cell in met))})", why, level, where, met)
        for (checks, why, level), met in blind.items()
    ]


def _too_short(columns: Mapping[str, np.ndarray], cells: Sequence[Cell]) -> bool:
    """Whether samples were watched and resisted, and of none of them is it known when it gained."""
    index = _of(columns, cells)
    right, fell, seen, gain = (columns[name][index].astype(float) for name in _COLUMNS[2:6])
    stood = (right == 1) & (fell == 0) & np.isfinite(seen)
    return bool(stood.any()) and not np.isfinite(gain[stood]).any()


def _not_run(checks: str, why: str, level: Level, where: str, cells: Sequence[Cell | str]) -> Finding:
    about = tuple(cell if isinstance(cell, str) else cell.id for cell in cells)
    told = finding("check_not_run", f"{checks}: {why}", where, level=level)
    return told.model_copy(update={"applies_to": about})


def _spread(positions: Sequence[int]) -> tuple[int, ...]:
    """A few of `positions`, evenly spaced: data sets are often sorted by class."""
    count = min(len(positions), _SAMPLES)
    return tuple(positions[i * len(positions) // count] for i in range(count))


@final
@dataclass(frozen=True, kw_only=True)
class _Harder:
    """One victim at one budget, and everything that is tried on it again."""

    again: Retrial
    cells: tuple[str, ...]
    tried: tuple[AttackConfig, ...]
    standing: tuple[int, ...]
    correct: tuple[int, ...]

    @property
    def where(self) -> str:
        """The victim, as findings name it."""
        again, stage = self.again, self.stage.stage
        return f"{stage.encoder} | {again.head} | {stage.data} | {again.defense} | worst_case | {again.threat}"

    @property
    def stage(self) -> StageAtWork:
        """Where it is loaded."""
        return self.again.stage

    @property
    def shield(self) -> Shield | None:
        """The defence."""
        return self.stage.shields[self.again.defense]

    def findings(self) -> list[Finding]:
        """What every check comes to; one that fails is a finding of its own, and so is why others did not run."""
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
        found: list[Finding] = []
        idle: dict[tuple[str, Level], list[str]] = {}
        for name, check in checks:
            try:
                results = self._run(check)
            except NotRun as why:
                idle.setdefault((str(why), "warning" if why.mendable else "note"), []).append(name)
                continue
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it becomes an error-level finding
                text = f"{name}: {type(error).__name__}: {error}"
                results = [finding("strict_check_failed", text)]
            found += [f.model_copy(update={"cell": self.where, "applies_to": self.cells}) for f in results]
        untold = [
            _not_run(", ".join(names), why, level, self.where, self.cells) for (why, level), names in idle.items()
        ]
        return found + untold

    def _run(self, check: Callable[[], list[Finding]]) -> list[Finding]:
        if self.again.threat.radius == 0:
            raise NotRun("the budget allows no change")
        if not self.correct:
            raise NotRun("no sample is right when clean")
        return check()

    def _need_gradient(self) -> None:
        """A head that answers in words, say, passes none; a defence or an encoder that cuts it off is a failure.

        Raises:
            NotRun: The head's logits do not hang on its features.
        """
        name = self.again.head
        with torch.no_grad():
            features = self.stage.body(name)(self.again.batch(self.correct[:1]).images)
        with torch.enable_grad():
            if not self.stage.heads[name](features.detach().requires_grad_(True)).requires_grad:
                raise NotRun("the head passes no gradient")

    def _jumps(self) -> list[Finding]:
        """Whether the loss that white-box attacks follow jumps around the images."""
        self._need_gradient()
        chosen = self.correct[:_PROBED]
        through = perceive(self.shield, "full")
        name = self.again.head
        encoder, head = self.stage.body(name), self.stage.heads[name]

        def see(images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = head(features_of_looks(encoder, through(images)))
            return logits

        images = self.again.batch(chosen).images
        exact = self.shield is None or (self.shield.spec.gradient == "exact" and not self.shield.spec.stochastic)
        with fresh_draw(derive_seed(self.stage.seed, "jumps"), self.stage.device):
            doubts = probe_gradient(images, see, self.again.threat, loss="margin", honest=exact)
            labels = self.stage.labels[name][list(chosen)]
            return probe_loss(images, see, labels, honest=exact and not doubts)

    def _unbounded(self) -> list[Finding]:
        """Whether anything survives a budget at which every image can be made grey; a detector may well refuse grey."""
        if self.shield is not None and self.shield.spec.detects:
            raise NotRun("a detector may well refuse an image that is all grey")
        self._need_gradient()
        chosen = _spread(self.correct)
        fooled = self.again.fooled(_GRADIENT, {"steps": 2 * _STEPS}, chosen, threat=_UNBOUNDED)
        left = 1 - sum(fooled) / len(fooled)
        head = self.stage.heads[self.again.head]
        labels = self.stage.labels[self.again.head][list(chosen)].tolist()
        chance = max(max(labels.count(label) for label in set(labels)) / len(labels), 1 / head.num_classes)
        # One class for all images keeps those of that class right, and that is no robustness.
        if left <= chance:
            return []
        text = f"{left:.0%} of {len(chosen)} samples resist linf 0.5; one class for all would keep {chance:.0%} right"
        return [finding("unbounded_fails", text, figure=left)]

    def _doubled(self, parameter: str, kind: str) -> list[Finding]:
        """The attacks of the audit with twice as much of one parameter."""
        if not self.standing:
            return []  # everything fell already
        self._need_gradient()
        if not self.tried:
            raise NotRun("no white-box attack of the audit knew this victim", mendable=True)
        values = {
            entry.title: self.again.registry.attacks[entry.name].effective(entry.params).get(parameter)
            for entry in self.tried
        }
        found, asked = [], False
        for entry in self.tried:
            value = values[entry.title]
            if isinstance(value, int):
                params, asked = {**entry.params, parameter: 2 * value}, True
                found += self._broken(kind, entry.name, params, f"{entry.title} with {parameter}={2 * value}")
        if not asked:
            raise NotRun(f"no parameter {parameter} to double in {', '.join(values)}")
        return found

    def _single_step(self) -> list[Finding]:
        self._need_gradient()
        params = {"steps": 1, "step_size": self.again.threat.radius, "random_start": False}
        return self._broken("single_step_wins", _GRADIENT, params, "one step of the gradient's sign")

    def _by_queries(self, name: str, queries: int, kind: str) -> list[Finding]:
        if self.shield is not None and self.shield.spec.detects:
            raise NotRun("a query attack does not know how to evade a detector")
        return self._broken(kind, name, {"queries": queries}, f"{name} with {queries} queries")

    def _fixed_draw(self) -> list[Finding]:
        """Whether the attack wins at least when the defence's randomness is known and stands still."""
        shield, chosen = self.shield, _spread(self.correct)
        assert shield is not None, "a random defence"
        self._need_gradient()
        still = dataclasses.replace(
            shield,
            spec=dataclasses.replace(shield.spec, stochastic=False),
            defense=Still(shield.defense, derive_seed(self.stage.seed, "still"), self.stage.device),
        )
        with replaced(self.stage.shields, self.again.defense, still):
            rows = self.again.rows(_GRADIENT, {"steps": 2 * _STEPS}, chosen, fresh=True)
        # Some that most draws get right are wrong on this one, attacked or not.
        fooled = [bool(row["fooled"]) for row in rows if row["clean_correct"]]
        if not fooled:
            raise NotRun("no sample that was tried is right on the fixed draw")
        if (won := sum(fooled) / len(fooled)) >= _FIXED:
            return []
        text = f"with one draw fixed, {won:.0%} of {len(fooled)} correct samples fall"
        return [finding("randomness_carries", text, figure=won)]

    def _broken(self, kind: str, name: str, params: Mapping[str, Any], words: str) -> list[Finding]:
        """The finding `kind`, where the attack breaks a large enough share of the correct samples that had resisted."""
        chosen = _spread(self.standing)
        if not chosen:
            return []  # everything fell already
        fell = sum(self.again.fooled(name, params, chosen))
        # Only part of what resisted was tried: the share is scaled up to all of it.
        share = fell / len(chosen) * len(self.standing) / len(self.correct)
        limit = FINDINGS[kind].threshold or 0.0
        if not fell or share <= limit:
            return []
        text = f"{words} breaks {fell} of {len(chosen)} samples that had resisted every attack"
        return [finding(kind, text, figure=share)]
