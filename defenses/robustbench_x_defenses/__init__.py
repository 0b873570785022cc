"""First-party defences and hardenings, registered through the same entry point as anyone's."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustbench_x.registry import Registry

__all__ = ["register"]


def register(registry: "Registry") -> None:
    """Adds every defence and hardening of this package to `registry`."""
    from robustbench_x_defenses import detectors, hardening, jpeg, preprocess, raw_isp

    registry.add_defense(jpeg.SPEC)
    for defense in preprocess.specs():
        registry.add_defense(defense)
    registry.add_defense(raw_isp.spec())
    for detector in detectors.specs():
        registry.add_defense(detector)
    for spec in hardening.specs():
        registry.add_hardening(spec)
