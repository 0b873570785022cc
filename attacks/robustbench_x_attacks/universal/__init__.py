"""Universal attacks: one pattern for every image, learned from an encoder and unlabelled images."""

from robustbench_x.plugin import AttackSpec

__all__ = ["specs"]


def specs() -> tuple[AttackSpec, ...]:
    """Every universal attack of this package."""
    from robustbench_x_attacks.universal import advencoder, baselines, xtransfer

    return (advencoder.SPEC, *baselines.SPECS, xtransfer.SPEC)
