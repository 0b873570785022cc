"""AutoAttack and its parts that are not gradient ascent: targeted FAB, Square, and a random search as a control."""

from robustbench_x.plugin import AttackSpec

__all__ = ["specs"]


def specs() -> tuple[AttackSpec, ...]:
    """One spec per attack."""
    from robustbench_x_attacks.autoattack import fab, random_search, square, suite

    return (suite.SPEC, fab.SPEC, square.SPEC, random_search.SPEC)
