"""The plan: which cells an audit has, and which images are crafted once and judged in several of them.

Encoder-level attacks and controls know no head, so their images are made once and judged under every head.
An attacker oblivious of a defence makes the very images he makes without it, so those are made once too.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from robustbench_x import __version__
from robustbench_x.config import AttackConfig, AuditConfig, DefenseConfig
from robustbench_x.errors import ConfigError
from robustbench_x.plugin import AttackSpec
from robustbench_x.registry import Registry
from robustbench_x.threat import ThreatModel
from robustbench_x.views import Knowledge

__all__ = ["UNDEFENDED", "Cell", "Craft", "Plan", "Stage", "make_plan"]

UNDEFENDED = "none"
_BLIND = ("none", "encoder")
"""Access levels whose images do not depend on the head."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of the matrix: who attacks what, knowing what, with which budget."""

    encoder: str
    head: str
    data: str
    defense: str
    knowledge: Knowledge
    attack: str
    threat: ThreatModel

    @property
    def id(self) -> str:
        """Unique in a run, and readable."""
        shield = self.defense if self.defense == UNDEFENDED else f"{self.defense}:{self.knowledge}"
        return f"{self.encoder} | {self.head} | {self.data} | {shield} | {self.attack} | {self.threat}"


@dataclass(frozen=True, kw_only=True)
class Craft:
    """Images to be made once: an attack against one view of the victim, judged in all of `cells`.

    `head` is the head it may see (None for attacks that see none); `seen` and `knowledge` the defence as the
    attacker has it (`none` when it sees no defence). `exhaustive` is set when the images must also stand
    against a defence they were not made for, so none may stop at the first success.
    """

    attack: AttackConfig
    threat: ThreatModel
    head: str | None
    seen: str
    knowledge: Knowledge
    exhaustive: bool
    cells: tuple[Cell, ...]

    @property
    def id(self) -> str:
        """A short digest, for file names."""
        text = "\n".join([*(cell.id for cell in self.cells), self.attack.model_dump_json()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Everything that shares an encoder and a data set, and so its clean features."""

    encoder: str
    data: str
    samples: int | None
    heads: tuple[str, ...]
    crafts: tuple[Craft, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All stages of an audit; `fingerprint` says whether a stored run is of this very audit."""

    stages: tuple[Stage, ...]
    fingerprint: str

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, in report order."""
        return tuple(cell for stage in self.stages for craft in stage.crafts for cell in craft.cells)


def make_plan(config: AuditConfig, registry: Registry) -> Plan:
    """The matrix of `config`, checked against the registry before anything is loaded.

    Raises:
        UnknownNameError: An attack, defence, head or source is not registered.
        MissingExtraError: An attack, defence or head needs a package that is not installed.
        ConfigError: A parameter is wrong, an attack lacks the norm, or targets contradict each other.
    """
    attacks = [(entry, registry.attacks[entry.name]) for entry in with_noise(config.attack)]
    for entry, spec in attacks:
        spec.build(entry.params)
        if config.norm not in spec.norms:
            raise ConfigError(f"attack {spec.name} has no norm '{config.norm}'; it has {', '.join(spec.norms)}")
    for defense in config.defense:
        shield = registry.defenses[defense.name]
        shield.build(defense.params)
        foreign = [k for k in defense.knowledge or () if k not in shield.knowledge]
        if foreign:
            raise ConfigError(f"defense {shield.name} has no knowledge level {foreign[0]}; it has {shield.knowledge}")
    stages = []
    for (encoder, data), (heads, samples) in _pairs(config, registry).items():
        crafts = [
            craft
            for threat in config.threats
            for entry, spec in attacks
            for craft in _crafts(config, registry, encoder, data, heads, entry, spec, threat)
        ]
        stages.append(Stage(encoder=encoder, data=data, samples=samples, heads=heads, crafts=tuple(crafts)))
    return Plan(stages=tuple(stages), fingerprint=_fingerprint(config, registry))


def with_noise(attacks: tuple[AttackConfig, ...]) -> tuple[AttackConfig, ...]:
    """`attacks` with the noise control first: every audit carries it."""
    others = tuple(entry for entry in attacks if entry.name != "noise")
    noise = tuple(entry for entry in attacks if entry.name == "noise") or (AttackConfig(name="noise"),)
    return (*noise, *others)


def _pairs(config: AuditConfig, registry: Registry) -> Mapping[tuple[str, str], tuple[tuple[str, ...], int | None]]:
    """(encoder, data) to its heads and sample count."""
    pairs: dict[tuple[str, str], tuple[tuple[str, ...], int | None]] = {}
    for target in config.target:
        for name in target.head:
            scheme = registry.heads[name.partition(":")[0]].tune
            if scheme is not None:
                scheme.require()
        for encoder in target.encoder:
            registry.encoders[encoder.partition(":")[0]]
            for data in target.data:
                registry.data[data.partition(":")[0]]
                samples = target.samples if config.samples is None else config.samples
                known: tuple[tuple[str, ...], int | None] = pairs.get((encoder, data), ((), samples))
                heads, before = known
                if before != samples:
                    raise ConfigError(
                        f"{encoder} on {data} is asked for with samples={before} and samples={samples}; "
                        "one pair has one set of samples"
                    )
                pairs[encoder, data] = ((*heads, *(h for h in target.head if h not in heads)), samples)
    return pairs


def _crafts(
    config: AuditConfig,
    registry: Registry,
    encoder: str,
    data: str,
    heads: tuple[str, ...],
    entry: AttackConfig,
    spec: AttackSpec,
    threat: ThreatModel,
) -> list[Craft]:
    groups: list[tuple[str | None, tuple[str, ...]]] = (
        [(None, heads)] if spec.access in _BLIND else [(head, (head,)) for head in heads]
    )
    shields = [
        (shield, _knowledge(shield, registry, spec, entry, encoder, ladder=config.ladder)) for shield in config.defense
    ]
    crafts = []
    for seen_head, judged in groups:
        blind: list[tuple[str, Knowledge]] = [(UNDEFENDED, "none")]
        blind += [(s.title, "oblivious") for s, levels in shields if "oblivious" in levels]
        aware: list[list[tuple[str, Knowledge]]] = [
            [(s.title, level)] for s, levels in shields for level in levels if level != "oblivious"
        ]
        for views in [blind, *aware]:
            cells = tuple(
                Cell(
                    encoder=encoder,
                    head=head,
                    data=data,
                    defense=defense,
                    knowledge=level,
                    attack=entry.title,
                    threat=threat,
                )
                for defense, level in views
                for head in judged
            )
            seen, knowledge = views[0]
            exhaustive = config.mode == "exhaustive" or len(views) > 1
            crafts.append(
                Craft(
                    attack=entry,
                    threat=threat,
                    head=seen_head,
                    seen=seen,
                    knowledge=knowledge,
                    exhaustive=exhaustive,
                    cells=cells,
                )
            )
    return crafts


def _knowledge(
    shield: DefenseConfig, registry: Registry, spec: AttackSpec, entry: AttackConfig, encoder: str, *, ladder: bool
) -> tuple[Knowledge, ...]:
    """The levels at which this attack meets this defence; an attack that asks the model nothing can only be oblivious.

    So can one that comes with a finished artefact, of which nothing was learned through the defence; one that is
    fitted or runs on another encoder: neither ever sees a gradient of this victim through its defence; and, of a
    detector, one that does not know how to evade.

    Query attacks always face the deployed defence, so they know it by its answers: `full` stands for that. An imitation
    of the defence is trained for the ladder, or where the audit lists `bpda_learned`.
    """
    known = registry.defenses[shield.name]
    usual: tuple[Knowledge, ...] = tuple(k for k in known.knowledge if ladder or k != "bpda_learned")
    levels: tuple[Knowledge, ...] = shield.knowledge or usual
    if spec.access == "none" or (known.detects and not spec.joint):
        return ("oblivious",)
    if spec.fits:
        attack = spec.build(entry.params)
        if spec.ready(attack) or attack.fit_encoder not in ("", encoder):
            return ("oblivious",)
    elif spec.partners_run:
        return ("oblivious",)
    if spec.access in ("scores", "labels"):
        return ("full",)
    return tuple(levels)


def _fingerprint(config: AuditConfig, registry: Registry) -> str:
    """What decides the numbers: the versions, and the configuration but for where, how fast and how checked it runs."""
    values = {k: v for k, v in config.replay().items() if k not in ("device", "batch_size", "allow_pickle", "checks")}
    owners = {registry.attacks.origin(entry.name) for entry in config.attack}
    owners |= {registry.defenses.origin(entry.name) for entry in config.defense}
    text = json.dumps([__version__, sorted((owner, _version(owner)) for owner in owners), values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _version(distribution: str) -> str:
    """The installed version of a plugin's distribution; empty for a plugin registered by hand."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
