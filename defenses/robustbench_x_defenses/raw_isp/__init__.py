"""raw_isp: RGB to a camera's RAW and back through a learned and a conventional pipeline (Zhang, Dong & Heide 2022)."""

from robustbench_x.plugin import DefenseSpec

__all__ = ["spec"]


def spec() -> DefenseSpec:
    """The defence."""
    from robustbench_x_defenses.raw_isp import defense

    return defense.SPEC
