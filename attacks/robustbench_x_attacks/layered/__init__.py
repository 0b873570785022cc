"""Attacks on single images through the layers of an encoder: DTA, its search, and the baselines on the same grid."""

from robustbench_x.plugin import AttackSpec

__all__ = ["specs"]


def specs() -> tuple[AttackSpec, ...]:
    """One spec per attack."""
    from robustbench_x_attacks.layered import baselines, dta, umi_grat

    return (dta.SPEC, *baselines.SPECS, umi_grat.SPEC)
