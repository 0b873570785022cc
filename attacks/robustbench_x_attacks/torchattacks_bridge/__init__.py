"""Every usable attack of torchattacks 3.5.1, some with the encoder alone too; the first run imports torchattacks.

`torchattacks:NAME` faces the victim, `instance:NAME` only the encoder, through an instance head.
"""

import dataclasses
import importlib.util

from robustbench_x.plugin import AttackSpec
from robustbench_x_attacks.torchattacks_bridge.bridge import Bridge
from robustbench_x_attacks.torchattacks_bridge.catalogue import ENTRIES
from robustbench_x_attacks.torchattacks_bridge.entry import Entry
from robustbench_x_attacks.torchattacks_bridge.instance import INSTANCE_ENTRIES, InstanceBridge, InstanceParams

__all__ = ["attack_class", "instance_class", "specs"]


def specs() -> list[AttackSpec]:
    """One spec per attack, whether torchattacks is installed or not."""
    return [_spec(entry) for entry in ENTRIES] + [_instance_spec(entry) for entry in INSTANCE_ENTRIES]


def attack_class(entry: Entry) -> type[Bridge]:
    """The frozen dataclass whose fields are the entry's parameters."""
    return dataclasses.make_dataclass(
        entry.name,
        [(knob.name, knob.annotation, knob.field()) for knob in entry.all_knobs],
        bases=(Bridge,),
        namespace={"entry": entry, "__doc__": f"{entry.summary} ({entry.source})."},
        frozen=True,
        kw_only=True,
    )


def _spec(entry: Entry) -> AttackSpec:
    return AttackSpec(
        name=f"torchattacks:{entry.name}",
        summary=entry.summary,
        factory=attack_class(entry),
        source=entry.source,
        extra=("torchattacks", "torchattacks"),
        missing=_missing,
        access=entry.access,
        norms=entry.norms,
        goal=entry.goal,
        budget=entry.budget,
        control=entry.access == "none",
    )


def instance_class(entry: Entry) -> type[InstanceBridge]:
    """The frozen dataclass of `instance:NAME`."""
    doc = f"{entry.summary} ({entry.source}), away from the image's own features, on a bank of natural ones."
    return dataclasses.make_dataclass(
        f"Instance{entry.name}",
        [(knob.name, knob.annotation, knob.field()) for knob in entry.all_knobs],
        bases=(InstanceBridge, InstanceParams),
        namespace={"entry": entry, "__doc__": doc},
        frozen=True,
        kw_only=True,
    )


def _instance_spec(entry: Entry) -> AttackSpec:
    return AttackSpec(
        name=f"instance:{entry.name}",
        summary=f"{entry.summary}, encoder only: away from itself among natural images",
        factory=instance_class(entry),
        source=entry.source,
        extra=("torchattacks", "torchattacks"),
        missing=_missing,
        access="encoder",
        norms=entry.norms,
        fits=True,
        fitted_by=("images",),
    )


def _missing() -> bool:
    return importlib.util.find_spec("torchattacks") is None
