"""The contract kit over every registered defence, and proof that the kit catches what it should."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from robustbench_x.plugin import DefenseSpec
from robustbench_x.registry import load_registry
from robustbench_x.testing import DEFENSE_CHECKS

Check = Callable[[DefenseSpec], None]
REGISTRY = load_registry()
CHECKS = {check.__name__: check for check in DEFENSE_CHECKS}


@pytest.mark.parametrize("check", DEFENSE_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", [name for name in REGISTRY.defenses if name != "diffpure"])
def test_every_defence_keeps_the_contract(name: str, check: Check) -> None:
    """Diffusion purification needs a model of the user's; its own tests run the kit with a tiny one."""
    check(REGISTRY.defenses[name])


@dataclass(frozen=True, kw_only=True)
class _Flat:
    """Zeroes gradients."""

    def apply(self, images: Tensor) -> Tensor:
        return images + 0 * images.detach() if not images.requires_grad else images.detach() + 0 * images


@dataclass(frozen=True, kw_only=True)
class _Wanders:
    """Random, but says otherwise."""

    def apply(self, images: Tensor) -> Tensor:
        return (images + 0.01 * torch.randn_like(images)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class _Glares:
    """Leaves the range."""

    def apply(self, images: Tensor) -> Tensor:
        return images + 0.5


@dataclass(frozen=True, kw_only=True)
class _Averages:
    """Looks at the other images of the batch."""

    def apply(self, images: Tensor) -> Tensor:
        return 0.9 * images + 0.1 * images.mean(dim=0, keepdim=True)


@pytest.mark.parametrize(
    ("factory", "check", "message"),
    [
        (_Flat, "lets_gradients_through", "gradients are zero"),
        (_Wanders, "is_as_random_as_declared", "declared stochastic=False"),
        (_Glares, "returns_images", "pixels above 1"),
        (_Averages, "treats_images_alone", "alone and in a batch differ"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_kit_catches_a_broken_defence(factory: type, check: str, message: str) -> None:
    spec = DefenseSpec(name="broken", summary="planted", factory=factory, source="tests")
    with pytest.raises(AssertionError, match=message):
        CHECKS[check](spec)
