"""Hardenings: adversarial training of an encoder, without labels, on the images of any encoder-level attack."""

from robustbench_x.hardening import HardeningSpec

__all__ = ["specs"]


def specs() -> tuple[HardeningSpec, ...]:
    """One spec per hardening."""
    from robustbench_x_defenses.hardening import dta, fare

    return (fare.SPEC, dta.SPEC)
