"""Adversarial robustness audits of pre-trained encoders and their downstream heads, judged by the harness."""

from robustbench_x._version import __version__

__all__ = ["__version__"]
