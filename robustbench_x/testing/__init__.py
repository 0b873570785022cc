"""The contract kit: what every attack, defence and hardening must keep, for first- and third-party plugins alike.

    import pytest
    from robustbench_x.registry import load_registry
    from robustbench_x.testing import ATTACK_CHECKS

    @pytest.mark.parametrize("check", ATTACK_CHECKS, ids=lambda c: c.__name__)
    def test_contract(check):
        check(load_registry().attacks["my_attack"])

A check raises AssertionError, saying what was broken, and returns nothing.
"""

from robustbench_x.testing.attacks import ATTACK_CHECKS
from robustbench_x.testing.defenses import DEFENSE_CHECKS
from robustbench_x.testing.hardenings import HARDENING_CHECKS, toy_hardening
from robustbench_x.testing.toys import ToyVictim, fit_toy, linear_victim, make_view, toy_victim

__all__ = [
    "ATTACK_CHECKS",
    "DEFENSE_CHECKS",
    "HARDENING_CHECKS",
    "ToyVictim",
    "fit_toy",
    "linear_victim",
    "make_view",
    "toy_hardening",
    "toy_victim",
]
