"""Hardenings: an encoder trained without labels on the images of any encoder-level attack, or pruned."""

from robustbench_x.hardening import HardeningSpec

__all__ = ["specs"]


def specs() -> tuple[HardeningSpec, ...]:
    """One spec per hardening."""
    from robustbench_x_defenses.hardening import dta, fare, pruning, tecoa

    return (fare.SPEC, tecoa.SPEC, dta.SPEC, pruning.SPEC)
