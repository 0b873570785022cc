"""Every usable attack of torchattacks 3.5.1 as `torchattacks:NAME`; torchattacks is imported by the first run."""

import dataclasses
import importlib.util

from robustbench_x.plugin import AttackSpec
from robustbench_x_attacks.torchattacks_bridge.bridge import Bridge
from robustbench_x_attacks.torchattacks_bridge.catalogue import ENTRIES
from robustbench_x_attacks.torchattacks_bridge.entry import Entry

__all__ = ["attack_class", "specs"]


def specs() -> list[AttackSpec]:
    """One spec per attack, whether torchattacks is installed or not."""
    return [_spec(entry) for entry in ENTRIES]


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


def _missing() -> bool:
    return importlib.util.find_spec("torchattacks") is None
