"""What an audit is asked to do: a validated, frozen, replayable configuration."""

import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field

from robustbench_x.errors import ConfigError
from robustbench_x.numbers import format_eps, parse_number
from robustbench_x.threat import Norm, Placement, ThreatModel
from robustbench_x.toml import dump_toml, first_problem, parse_toml, read_toml

__all__ = [
    "AttackConfig",
    "AuditConfig",
    "DefenseConfig",
    "Number",
    "TargetConfig",
    "default_config",
    "ladder_attacks",
    "load_config",
    "override",
    "parse_params",
    "parse_value",
    "plugin_params",
]


def _number(value: Any) -> Any:
    try:
        return parse_number(value) if isinstance(value, (str, int, float)) else value
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _not_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, (str, int, float)) else value


Number = Annotated[float, BeforeValidator(_number), BeforeValidator(_not_boolean)]
"""A finite float that may be written as a fraction: `"8/255"`."""
Count = Annotated[int, Field(gt=0), BeforeValidator(_not_boolean)]
RESERVED = ("none", "noise", "worst_case")
"""Titles with a meaning of their own: the undefended control, the noise control, the worst case over attacks."""
Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]


class _Frozen(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetConfig(_Frozen):
    """Encoders, heads and data that are audited in every combination; a single name stands for a list of one."""

    encoder: Names
    head: Names = ("linear",)
    data: Names
    samples: Count | None = None


class _Plugin(_Frozen):
    """A plugin by name; `label` is what the report calls it; every other key is one of its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    label: str | None = None

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that were set."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def title(self) -> str:
        """What the report calls it."""
        return self.label or self.name


class AttackConfig(_Plugin):
    """An attack. One attack may run with several settings, each under its own label."""


class DefenseConfig(_Plugin):
    """A defence, and what the attackers know of it."""

    knowledge: tuple[Literal["oblivious", "bpda", "bpda_learned", "full"], ...] | None = None


_LADDER_LACKS = {"l2": ("uap",), "patch": ("square",)}
"""Attacks of the ladder that have not this norm."""
_BUDGET_HINTS = {"l2": "for example 1.0 (a Euclidean length)", "patch": "for example 0.03 (a share of the area)"}


class AuditConfig(_Frozen):
    """A whole audit.

    `eps` is in [0, 1] units (for `patch`: a share of the area), one value or a list. `samples` are drawn per
    data set, seeded and stratified. `mode` is `verdict` (a fooled sample leaves the batch) or `exhaustive`.
    `query_cap` bounds queries per sample for score and label attacks. `ladder` attacks every defence with the whole
    ladder: the attacks of `presets/ladder.toml` beside those listed, each at every knowledge it can have.
    `refuse_rate` is the share of clean images that a detector may refuse. `checks` are the cheap ones, or all of them:
    those that attack again too.
    """

    target: tuple[TargetConfig, ...] = Field(min_length=1)
    attack: tuple[AttackConfig, ...] = Field(min_length=1)
    defense: tuple[DefenseConfig, ...] = ()
    norm: Norm = "linf"
    eps: Annotated[tuple[Number, ...], BeforeValidator(_listed), Field(min_length=1)] = (4 / 255,)
    placement: Placement = "bottom-right"
    samples: Count | None = None
    surrogate: str | None = None
    surrogate_samples: Count = 256
    mode: Literal["verdict", "exhaustive"] = "verdict"
    query_cap: Count | None = None
    judge_draws: Count = 20
    ladder: Annotated[bool, Field(strict=True)] = False
    refuse_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    checks: Literal["cheap", "all"] = "cheap"
    batch_size: Count | Literal["auto"] = "auto"
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Annotated[int, BeforeValidator(_not_boolean)] = 0
    shard: str | None = None
    allow_pickle: bool = False

    @pydantic.field_validator("eps")
    @classmethod
    def _eps_in_range(cls, value: tuple[float, ...], info: pydantic.ValidationInfo) -> tuple[float, ...]:
        try:
            for eps in value:
                ThreatModel(norm=info.data.get("norm", "linf"), eps=eps)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if len({format_eps(eps) for eps in value}) != len(value):
            raise ValueError("a budget is listed twice")
        return value

    @pydantic.model_validator(mode="after")
    def _budget_is_of_its_norm(self) -> "AuditConfig":
        if self.norm != "linf" and "eps" not in self.model_fields_set:
            raise ValueError(f"norm {self.norm} has no default budget; give eps, {_BUDGET_HINTS[self.norm]}")
        return self

    @pydantic.field_validator("attack", "defense")
    @classmethod
    def _titles_differ(cls, value: tuple[_Plugin, ...]) -> tuple[_Plugin, ...]:
        titles = [entry.title for entry in value]
        for entry in value:
            if entry.label in RESERVED:
                raise ValueError(f"label '{entry.label}' means something else in a report; choose another")
            if entry.label and entry.name in RESERVED:
                raise ValueError(f"{entry.name} is looked up by its name, so it takes no label")
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"'{title}' is listed twice; give each its own label")
        return value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _climbs(cls, values: Any) -> Any:
        """A ladder's attacks beside the listed ones, of which those of the same title stay as they are."""
        if not isinstance(values, Mapping) or values.get("ladder") is not True:
            return values
        listed = values.get("attack", ())
        if not isinstance(listed, (list, tuple)):
            return values
        entries = [e.model_dump(exclude_none=True) if isinstance(e, AttackConfig) else e for e in listed]
        titles = [e.get("label") or e.get("name") for e in entries if isinstance(e, Mapping)]
        lacking = _LADDER_LACKS.get(str(values.get("norm")), ())
        added = [e for e in ladder_attacks() if e["name"] not in (*titles, *lacking)]
        return {**values, "attack": [*entries, *added]}

    @pydantic.field_validator("shard")
    @classmethod
    def _shard_is_a_share(cls, value: str | None) -> str | None:
        if value is not None:
            index, _, count = value.partition("/")
            if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
                raise ValueError(f"'{value}' is not a shard; write 1/4 for the first of four")
        return value

    @property
    def threats(self) -> tuple[ThreatModel, ...]:
        """One threat model per budget."""
        return tuple(ThreatModel(norm=self.norm, eps=eps, placement=self.placement) for eps in self.eps)

    def replay(self) -> dict[str, Any]:
        """The configuration as plain values that load back to the same audit."""
        values = self.model_dump(mode="json", exclude_none=True)
        short = [format_eps(eps) for eps in self.eps]
        values["eps"] = [
            t if "/" in t and parse_number(t) == eps else eps for t, eps in zip(short, self.eps, strict=True)
        ]
        return values

    def to_toml(self) -> str:
        """The same as TOML."""
        return dump_toml(self.replay())


def load_config(path: Path) -> AuditConfig:
    """The audit that a TOML file describes.

    Raises:
        ConfigError: The file is missing, malformed or does not fit; names file, line and key.
    """
    return read_toml(path, AuditConfig)


def ladder_attacks() -> list[dict[str, Any]]:
    """The attacks that `ladder` adds."""
    text = (files("robustbench_x") / "presets" / "ladder.toml").read_text(encoding="utf-8")
    attacks: list[dict[str, Any]] = tomllib.loads(text)["attack"]
    return attacks


def default_config() -> AuditConfig:
    """The audit that `rbx audit` runs when nothing is asked for."""
    resource = files("robustbench_x") / "presets" / "default.toml"
    return parse_toml(resource.read_text(encoding="utf-8"), AuditConfig, name="the embedded default")


def parse_params(assignments: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`attack.param=value` assignments by plugin name.

    Values are read as TOML where they are TOML (numbers, booleans, quoted strings) and as text otherwise.
    The plugin name may hold dots; the longest of `names` that fits is taken.

    Raises:
        ConfigError: An assignment is malformed or names a plugin that this audit does not run.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in assignments:
        left, equals, value = text.partition("=")
        owners = [name for name in names if left.startswith(f"{name}.")]
        if not equals or "." not in left:
            raise ConfigError(f"-p {text}: write attack.param=value, for example pgd.steps=50")
        if not owners:
            owner = left.rpartition(".")[0]
            raise ConfigError(f"-p {text}: this audit runs no '{owner}'; it runs {', '.join(names)}")
        owner = max(owners, key=len)
        found.setdefault(owner, {})[left[len(owner) + 1 :]] = parse_value(value)
    return found


def plugin_params(assignments: Sequence[str], name: str) -> dict[str, Any]:
    """`param=value` assignments of the one plugin `name`; `name.param=value` is understood too.

    Raises:
        ConfigError: An assignment is malformed.
    """
    full = [text if text.startswith(f"{name}.") else f"{name}.{text}" for text in assignments]
    return parse_params(full, [name]).get(name, {})


def _with_params(config: AuditConfig, assignments: Sequence[str]) -> AuditConfig:
    """`config` with `attack.param=value` assignments applied to its attacks and defences."""
    titles = [entry.title for entry in (*config.attack, *config.defense)]
    params = parse_params(assignments, titles)
    for owner, given in params.items():
        for key in given:
            if key in ("name", "label", ""):
                raise ConfigError(f"-p {owner}.{key}: {owner} has no parameter '{key}'")
    values = config.model_dump(mode="python")
    for kind in ("attack", "defense"):
        values[kind] = [{**entry, **params.get(entry["label"] or entry["name"], {})} for entry in values[kind]]
    return AuditConfig.model_validate(values)


def parse_value(text: str) -> Any:
    """What `text` says as TOML where it is TOML (numbers, booleans, lists, quoted strings), else the text itself."""
    try:
        parsed: Mapping[str, Any] = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def override(
    base: AuditConfig,
    *,
    from_file: bool,
    encoder: Sequence[str] | None = None,
    head: Sequence[str] | None = None,
    data: Sequence[str] | None = None,
    attack: Sequence[str] | None = None,
    defense: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    params: Sequence[str] = (),
) -> AuditConfig:
    """`base` with command-line flags on top.

    On a file, `encoder`, `head` and `data` replace those of every target, and an attack or defence that the
    file lists keeps the file's parameters. On the embedded default, naming any of the three starts a new
    audit: one target, no defence, and the default attacks at their own full settings rather than the quick ones.
    An artefact that ships for the default's encoders and norm is left out where these change.
    The defence `none` stands for no defence at all.

    Raises:
        ConfigError: A value does not fit.
    """
    asked = settings or {}
    norm = asked.get("norm", base.norm)
    if "eps" not in asked and norm != base.norm and norm in get_args(Norm):
        hint = _BUDGET_HINTS.get(norm, "for example 4/255")
        raise ConfigError(f"--norm {norm}: the budget at hand was given for {base.norm}; give --eps too, {hint}")
    values = base.model_dump(mode="python", exclude_none=True)
    listed = {
        kind: {e.title: e.model_dump(exclude_none=True) for e in getattr(base, kind)} for kind in ("attack", "defense")
    }
    if not from_file:
        listed = {"attack": {}, "defense": {}}
    if encoder or head or data:
        chosen = {k: tuple(v) for k, v in (("encoder", encoder), ("head", head), ("data", data)) if v}
        if from_file:
            replaced = [{**target, **chosen} for target in values["target"]]
            values["target"] = [t for i, t in enumerate(replaced) if t not in replaced[:i]]
        else:
            native_only = chosen.get("head") == ("native",)
            standard = {
                "encoder": ("packaged:efficientnet_lite0",),
                "head": ("linear",),
                "data": ("packaged:photos",) if native_only else ("packaged:digits",),
            }
            values |= {
                "target": [{**standard, **chosen}],
                "defense": [],
                "attack": [{"name": a.name} for a in base.attack if "artifact" not in a.params],
            }
    elif not from_file and norm != base.norm:
        values["attack"] = [entry for entry in values["attack"] if "artifact" not in entry]
    for kind, names in (("attack", attack), ("defense", defense)):
        if names:
            named = [name for name in names if (kind, name) != ("defense", "none")]
            values[kind] = [listed[kind].get(name, {"name": name}) for name in named]
    try:
        config = AuditConfig.model_validate({**values, **(settings or {})})
        return _with_params(config, params) if params else config
    except pydantic.ValidationError as error:
        problem = first_problem(error, AuditConfig)
        flag = str(problem.key[0]) if problem.key else ""
        if flag in (settings or {}):
            raise ConfigError(f"--{flag.replace('_', '-')}: {problem.message}") from error
        raise ConfigError(str(problem)) from error
