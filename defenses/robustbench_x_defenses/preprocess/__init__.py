"""Preprocessing defences from the literature: what an encoder may be defended with instead of hardening it."""

from robustbench_x.plugin import DefenseSpec

__all__ = ["specs"]


def specs() -> tuple[DefenseSpec, ...]:
    """One spec per defence."""
    from robustbench_x_defenses.preprocess import (
        bit_depth,
        crop_ensemble,
        diffpure,
        gaussian_noise,
        jpeg_random,
        median,
        resize_pad,
        super_resolution,
        tvm,
    )

    return (
        bit_depth.SPEC,
        median.SPEC,
        gaussian_noise.SPEC,
        jpeg_random.SPEC,
        resize_pad.SPEC,
        crop_ensemble.SPEC,
        tvm.SPEC,
        super_resolution.SPEC,
        diffpure.SPEC,
    )
