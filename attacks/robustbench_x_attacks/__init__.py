"""First-party attacks, registered through the same entry point as anyone's."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustbench_x.registry import Registry

__all__ = ["register"]


def register(registry: "Registry") -> None:
    """Adds every attack of this package to `registry`."""
    from robustbench_x_attacks import (
        aimed,
        anyattack,
        autoattack,
        embed,
        gradient,
        layered,
        noise,
        torchattacks_bridge,
        transfer,
        universal,
    )

    registry.add_attack(noise.SPEC)
    registry.add_attack(embed.SPEC)
    registry.add_attack(transfer.SPEC)
    for spec in gradient.SPECS:
        registry.add_attack(spec)
    for spec in autoattack.specs():
        registry.add_attack(spec)
    for spec in layered.specs():
        registry.add_attack(spec)
    for spec in universal.specs():
        registry.add_attack(spec)
    for spec in (*aimed.specs(), *anyattack.specs()):
        registry.add_attack(spec)
    for spec in torchattacks_bridge.specs():
        registry.add_attack(spec)
