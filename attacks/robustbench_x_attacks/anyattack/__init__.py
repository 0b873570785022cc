"""AnyAttack: a decoder that turns the embedding of any target image into noise which makes any image read as it."""

from robustbench_x.plugin import AttackSpec

__all__ = ["specs"]


def specs() -> tuple[AttackSpec, ...]:
    """The one attack of this package."""
    from robustbench_x_attacks.anyattack.attack import SPEC

    return (SPEC,)
