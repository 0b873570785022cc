"""The contract kit over every registered attack, and proof that the kit catches what it should."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from robustbench_x.plugin import AttackSpec
from robustbench_x.registry import load_registry
from robustbench_x.testing import ATTACK_CHECKS
from robustbench_x.views import ImageView, WhiteboxView

Check = Callable[..., None]
REGISTRY = load_registry()
QUICK: dict[str, dict[str, object]] = {
    "torchattacks:SPSA": {"steps": 5, "samples": 16},
    "torchattacks:Square": {"queries": 100},
    "torchattacks:AutoAttack": {"steps": 5, "queries": 20},
    "torchattacks:OnePixel": {"steps": 3, "popsize": 10},
    "torchattacks:FAB": {"steps": 10},
    "torchattacks:APGD": {"steps": 20},
    "torchattacks:APGDT": {"steps": 10},
    "torchattacks:EADL1": {"steps": 10, "search_steps": 2},
    "torchattacks:EADEN": {"steps": 10, "search_steps": 2},
    "torchattacks:CW": {"steps": 20},
    "torchattacks:Pixle": {"restarts": 5},
    "square": {"queries": 100},
    "autoattack": {"steps": 10, "queries": 50},
    "advencoder": {"steps": 20},
    **{name: {"steps": 30} for name in ("uap", "ssp", "dr", "fff", "pap")},
    "instance:VMIFGSM": {"steps": 4},
    "xtransfer": {"steps": 30, "partners": ["toy"]},
    "anyattack": {"steps": 3, "batch": 4, "k": 1},
    **{name: {"steps": 20} for name in ("attackvlm_ii", "attackvlm_it", "m_attack")},
    "ssa_cwa": {"steps": 5, "samples": 3},
}
"""Parameters that make the slow ones quick; their strength is not what this test is about."""
CHECKS = {check.__name__: check for check in ATTACK_CHECKS}


@pytest.mark.parametrize("check", ATTACK_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", list(REGISTRY.attacks))
def test_every_attack_keeps_the_contract(name: str, check: Check) -> None:
    check(REGISTRY.attacks[name], QUICK.get(name, {}))


@dataclass(frozen=True, kw_only=True)
class _Overruns:
    """Leaves the budget."""

    def run(self, view: ImageView) -> Tensor:
        return (view.inputs + 3 * view.threat.radius + 0.01).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class _Drifts:
    """Draws from the global generator."""

    def run(self, view: ImageView) -> Tensor:
        return view.threat.project(view.inputs + torch.randn_like(view.inputs), view.inputs)


@dataclass(frozen=True, kw_only=True)
class _Trains:
    """Leaves gradients in the weights."""

    def run(self, view: WhiteboxView) -> Tensor:
        view.model._logits.__self__.head.layer.weight.data.add_(1)  # type: ignore[attr-defined]
        return view.inputs


@dataclass(frozen=True, kw_only=True)
class _Scribbles:
    """Writes to its inputs."""

    def run(self, view: ImageView) -> Tensor:
        return view.inputs.mul_(0.999)


@dataclass(frozen=True, kw_only=True)
class _Shrinks:
    """Loses an image."""

    def run(self, view: ImageView) -> Tensor:
        return view.inputs[1:]


@dataclass(frozen=True, kw_only=True)
class _Contrary:
    """Works only at small budgets."""

    def run(self, view: WhiteboxView) -> Tensor:
        if view.threat.eps > 16 / 255:
            return view.inputs.clone()
        images: Tensor = REGISTRY.attacks["pgd"].build().run(view)
        return images


@pytest.mark.parametrize(
    ("factory", "access", "check", "message"),
    [
        (_Overruns, "none", "keeps_shape_and_budget", "leaves its budget by"),
        (_Drifts, "none", "repeats_by_seed", "two runs from one seed differ"),
        (_Drifts, "none", "leaves_everything_alone", "moved the global generator"),
        (_Trains, "whitebox", "leaves_everything_alone", "weights or buffers"),
        (_Scribbles, "none", "leaves_everything_alone", "wrote to its inputs"),
        (_Scribbles, "none", "changes_nothing_at_zero", None),
        (_Shrinks, "none", "works_on_one_image", "one image became"),
        (_Contrary, "whitebox", "never_helps_with_more", "fools"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_kit_catches_a_broken_attack(factory: type, access: str, check: str, message: str | None) -> None:
    spec = AttackSpec(
        name="broken",
        summary="planted",
        factory=factory,
        source="tests",
        access=access,  # type: ignore[arg-type]
        budget=factory is not _Contrary,
    )
    if message is None:
        CHECKS[check](spec)
        return
    with pytest.raises(AssertionError, match=message):
        CHECKS[check](spec)
