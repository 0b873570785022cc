"""The registry as plain values: what `rbx list` and `rbx describe` print, and the documentation's tables."""

import inspect
from typing import Any

from robustbench_x.data.dataset import DataSource
from robustbench_x.encoders.source import EncoderSource
from robustbench_x.errors import UnknownNameError
from robustbench_x.hardening import HardeningSpec
from robustbench_x.heads.base import HeadSpec
from robustbench_x.heads.tuning.recipe import Recipe
from robustbench_x.plugin import AttackSpec, DefenseSpec, Spec
from robustbench_x.registry import Registry

__all__ = ["catalogue", "describe_entry"]


def catalogue(registry: Registry) -> dict[str, list[dict[str, Any]]]:
    """Every kind to its entries, each a flat dictionary of plain values."""
    return {
        "attacks": [_attack(registry, spec) for spec in registry.attacks.values()],
        "defenses": [_defense(registry, spec) for spec in registry.defenses.values()],
        "hardenings": [_hardening(registry, spec) for spec in registry.hardenings.values()],
        "encoders": [{**_source(s), "from": registry.encoders.origin(s.scheme)} for s in registry.encoders.values()],
        "heads": [
            {"name": s.name, "installed": _installed(s), "from": registry.heads.origin(s.name), "summary": s.summary}
            for s in registry.heads.values()
        ],
        "data": [{**_source(s), "from": registry.data.origin(s.scheme)} for s in registry.data.values()],
    }


def describe_entry(registry: Registry, name: str) -> dict[str, Any]:
    """Everything known about one entry; a source string such as `packaged:photos` describes its scheme.

    Raises:
        UnknownNameError: No table has that name; lists near matches from all of them.
    """
    if name in registry.attacks:
        spec = registry.attacks[name]
        return {"kind": "attack", **_attack(registry, spec), **_parameters(spec)}
    if name in registry.defenses:
        shield = registry.defenses[name]
        return {"kind": "defense", **_defense(registry, shield), **_parameters(shield)}
    if name in registry.hardenings:
        hardening = registry.hardenings[name]
        return {"kind": "hardening", **_hardening(registry, hardening), **_parameters(hardening)}
    if name in registry.heads:
        return {"kind": "head", **_head(registry, registry.heads[name])}
    scheme = name.partition(":")[0]
    found = [
        {"kind": kind, **_source(table[scheme])}
        for kind, table in (("encoder source", registry.encoders), ("data source", registry.data))
        if scheme in table and (scheme == name or _has(table[scheme], name))
    ]
    if found:
        return {**found[0], "also": found[1]} if len(found) > 1 else found[0]
    known = [*registry.attacks, *registry.defenses, *registry.hardenings, *registry.heads]
    known += [f"{s}:{n}" for t in (registry.encoders, registry.data) for s in t for n in t[s].names]
    raise UnknownNameError("name", name, [*known, *registry.encoders, *registry.data])


def _source(entry: EncoderSource | DataSource) -> dict[str, Any]:
    return {"name": entry.scheme, "usage": entry.usage, "names": list(entry.names), "summary": entry.summary}


def _has(entry: EncoderSource | DataSource, name: str) -> bool:
    rest = name.partition(":")[2].partition("?")[0]
    return not entry.names or rest in entry.names


def _attack(registry: Registry, spec: AttackSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "access": spec.access,
        "norms": list(spec.norms),
        "goal": spec.goal,
        "budget": "fixed" if spec.budget else "minimal",
        "trained": "first, by rbx fit or on demand" if spec.fits else "",
        "installed": not (spec.extra and spec.missing()),
        "from": registry.attacks.origin(spec.name),
        "summary": spec.summary,
        "source": spec.source,
    }


def _defense(registry: Registry, spec: DefenseSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "gradient": spec.gradient,
        "stochastic": spec.stochastic,
        "refuses": spec.detects,
        "trained": _training(spec),
        "knowledge": list(spec.knowledge),
        "installed": not (spec.extra and spec.missing()),
        "from": registry.defenses.origin(spec.name),
        "summary": spec.summary,
        "source": spec.source,
    }


def _training(spec: DefenseSpec) -> str:
    """On what a defence is trained; nothing where it learns nothing."""
    if not spec.fits:
        return ""
    return "for one encoder, on clean images" if spec.per_encoder else "once, on patches of clean images"


def _hardening(registry: Registry, spec: HardeningSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "eps": spec.eps if spec.attacked else "none",
        "inner": next((p.default for p in spec.params if p.name == "inner"), "none"),
        "installed": not (spec.extra and spec.missing()),
        "from": registry.hardenings.origin(spec.name),
        "summary": spec.summary,
        "source": spec.source,
    }


def _head(registry: Registry, spec: HeadSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "reads": "a tuned copy of the public encoder" if spec.tune else "",
        "installed": _installed(spec),
        "from": registry.heads.origin(spec.name),
        "summary": spec.summary,
        "settings": dict(spec.settings or {}),
        "documentation": f"{spec.tune.documentation}\n\n{inspect.getdoc(Recipe)}" if spec.tune else "",
    }


def _installed(spec: HeadSpec) -> bool:
    return spec.tune is None or spec.tune.installed


def _parameters(spec: Spec) -> dict[str, Any]:
    params = [{"name": p.name, "type": p.type, "default": p.default, "help": p.help} for p in spec.params]
    return {"params": params, "documentation": inspect.getdoc(spec.factory) or ""}
