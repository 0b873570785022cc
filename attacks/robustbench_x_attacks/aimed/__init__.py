"""Iterative attacks that pull an image's embedding towards that of a target image or its caption."""

from robustbench_x.plugin import AttackSpec

__all__ = ["specs"]


def specs() -> tuple[AttackSpec, ...]:
    """One spec per attack."""
    from robustbench_x_attacks.aimed import attackvlm, m_attack, ssa_cwa

    return (*attackvlm.SPECS, m_attack.SPEC, ssa_cwa.SPEC)
