"""Detectors: they refuse images instead of changing them; the harness sets their threshold on clean images."""

from robustbench_x.plugin import DefenseSpec

__all__ = ["specs"]


def specs() -> tuple[DefenseSpec, ...]:
    """One spec per detector."""
    from robustbench_x_defenses.detectors import mvg, squeezing

    return (mvg.SPEC, squeezing.SPEC)
