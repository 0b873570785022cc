"""Twelve planted frauds, each audited end to end with every check: all are flagged, and none passes a strict gate.

Masked gradient, shattered gradient, NaN, probabilities as logits, out-of-range input, frozen attack, label leak,
random defence judged once, optimisation loop at test time, silent clean return, budget overrun, dead restart. Where a
fraud has a side of the attacker and one of the defender, both are planted. Labels can leak in two ways only: an
encoder-level attack reaches for them and finds none; a defence is never handed any, but may remember the test images.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from project import NATIVE, Audited, attack, audit, audit_config, defense
from robustbench_x.data.dataset import open_dataset
from robustbench_x.engine import strict
from robustbench_x.gate import decide, judge_gates
from robustbench_x.plugin import AttackSpec, DefenseSpec
from robustbench_x.policy import Policy
from robustbench_x.registry import load_registry
from robustbench_x.result import Decision
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderView, View, WhiteboxView

PGD: Mapping[str, Any] = {"name": "pgd", "steps": 5}
SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Dims:
    """An honest defence: less contrast, true gradient."""

    def apply(self, images: Tensor) -> Tensor:
        return 0.9 * images + 0.05


@dataclass(frozen=True, kw_only=True)
class Grains:
    """An honest random defence: a little noise."""

    def apply(self, images: Tensor) -> Tensor:
        return (images + 0.02 * torch.randn_like(images)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Masked:
    """The images, with every gradient multiplied by 0."""

    def apply(self, images: Tensor) -> Tensor:
        return images.detach() + 0 * images


@dataclass(frozen=True, kw_only=True)
class Shattered:
    """A ripple far finer than any budget, whose slope drowns that of the image."""

    def apply(self, images: Tensor) -> Tensor:
        return (images + 0.01 * torch.sin(1e5 * images)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class NaNOffGrid:
    """Honest on 8-bit images, NaN on all others."""

    def apply(self, images: Tensor) -> Tensor:
        levels = images * 255
        perturbed = (levels - levels.round()).abs().amax(dim=(1, 2, 3), keepdim=True) > 1e-3
        return torch.where(perturbed, images * torch.nan, images)


@dataclass(frozen=True, kw_only=True)
class TooBright:
    """Hands the encoder pixels that are none."""

    def apply(self, images: Tensor) -> Tensor:
        return 2 * images


@dataclass(frozen=True, kw_only=True)
class OutOfRange:
    """Returns pixels that are none."""

    def run(self, view: View) -> Tensor:
        return view.inputs - 2


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """Asks once and never moves."""

    def run(self, view: WhiteboxView) -> Tensor:
        view.model(view.inputs)
        return view.inputs


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """An attack on the encoder that wants the labels."""

    def run(self, view: EncoderView) -> Tensor:
        labels: Tensor = view.labels  # type: ignore[attr-defined]
        return view.inputs + labels.view(-1, 1, 1, 1)


_REMEMBERED: list[Tensor] = []


@dataclass(frozen=True, kw_only=True)
class Remembers:
    """Returns the test image that is nearest, and claims to be the identity."""

    def apply(self, images: Tensor) -> Tensor:
        (memory,) = _REMEMBERED
        nearest = torch.cdist(images.detach().flatten(1), memory.flatten(1)).argmin(dim=1)
        return memory[nearest] + (images - images.detach())


@dataclass(frozen=True, kw_only=True)
class Loops:
    """Descends a loss of its own before it answers."""

    def apply(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            pixels = images.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad((pixels - 0.5).square().sum(), pixels)
        return images - 0.05 * gradient


def _walk(view: WhiteboxView) -> Tensor:
    """A few honest steps that fool the victim on the way."""
    images = view.inputs
    for _ in range(5):
        images = images.detach().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(view.model(images), view.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
        images = view.threat.project(images + view.threat.eps / 2 * gradient.sign(), view.inputs)
    images = images.detach()
    with torch.no_grad():
        view.model(images)
    return images


@dataclass(frozen=True, kw_only=True)
class SilentClean:
    """Wins, and returns what it was given."""

    def run(self, view: WhiteboxView) -> Tensor:
        _walk(view)
        return view.inputs


@dataclass(frozen=True, kw_only=True)
class DeadRestart:
    """Wins, starts again somewhere else, gives up there and returns that."""

    def run(self, view: WhiteboxView) -> Tensor:
        _walk(view)
        start = view.threat.start(view.inputs, view.random)
        with torch.no_grad():
            view.model(start)
        return start


@dataclass(frozen=True, kw_only=True)
class Overruns:
    """Ten times the budget."""

    def run(self, view: View) -> Tensor:
        return ThreatModel(norm=view.threat.norm, eps=10 * view.threat.eps).noise(view.inputs, view.random)


NATIVE_HEAD: Mapping[str, Any] = {"encoder": NATIVE, "head": "native", "eps": 0.08}
PLANTED: Mapping[str, tuple[AttackSpec | DefenseSpec | None, Mapping[str, Any], set[str], int]] = {
    "masked gradient": (defense(Masked), {}, {"zero_gradient", "no_better_than_noise", "unbounded_fails"}, 4),
    "shattered gradient": (defense(Shattered), {}, {"misleading_gradient"}, 4),
    "NaN": (defense(NaNOffGrid), {}, {"sample_errors", "nonfinite_output"}, 3),
    "probabilities as logits": (
        None,
        {**NATIVE_HEAD, "encoder": "python:project:probabilities"},
        {"not_logits"},
        4,
    ),
    "out-of-range input, defence": (defense(TooBright), {}, {"sample_errors", "probe_failed"}, 3),
    "out-of-range input, attack": (attack(OutOfRange, access="none"), {}, {"budget_overrun"}, 4),
    "frozen attack": (attack(Frozen), {}, {"idle_attack", "no_better_than_noise"}, 4),
    "label leak, attack": (attack(Leaks, access="encoder"), {}, {"sample_errors"}, 3),
    "label leak, defence": (defense(Remembers), {}, {"misleading_gradient", "no_better_than_noise"}, 4),
    "random defence judged once": (defense(Grains, stochastic=True), {"judge_draws": 1}, {"few_draws"}, 4),
    "optimisation loop at test time": (defense(Loops), {}, {"loop_at_inference"}, 4),
    "silent clean return": (attack(SilentClean), {}, {"silent_success", "idle_attack"}, 4),
    "budget overrun": (attack(Overruns, access="none"), {}, {"budget_overrun"}, 4),
    "dead restart": (attack(DeadRestart), {}, {"silent_success"}, 4),
}
HONEST: Mapping[str, tuple[DefenseSpec | None, Mapping[str, Any]]] = {
    "undefended": (None, {}),
    "defended": (defense(Dims), {}),
    "random": (defense(Grains, stochastic=True), {"judge_draws": 20}),
    "native": (None, NATIVE_HEAD),
}


@pytest.fixture(autouse=True)
def _fewer_queries(monkeypatch: pytest.MonkeyPatch, images: Path) -> Iterator[None]:
    """The strict checks on fewer queries than they usually spend, and the test images for who remembers them."""
    monkeypatch.setattr(strict, "_QUERIES", 40)
    monkeypatch.setattr(strict, "_DRAWS", 20)
    items = open_dataset(f"folder:{images}", load_registry(), seed=0).test
    _REMEMBERED[:] = [torch.stack([_pixels(item.load()) for item in items])]
    yield
    _REMEMBERED.clear()


def _pixels(image: Any) -> Tensor:
    levels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return levels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def _audited(images: Path, out: Path, spec: AttackSpec | DefenseSpec | None, settings: Mapping[str, Any]) -> Audited:
    plans: dict[str, Any] = {"attacks": [PGD], "samples": SAMPLES, "checks": "all", **settings}
    if isinstance(spec, AttackSpec):
        plans["attacks"] = [spec.name]
    if isinstance(spec, DefenseSpec):
        plans |= {"defenses": [spec.name], "knowledge": ["oblivious", "full"]}
        if spec.stochastic:
            plans["attacks"] = [{**PGD, "eot": 2}]
    return audit(audit_config(images, **plans), out, *([] if spec is None else [spec]))


def _strictly(audited: Audited, *, least: float = 1.0) -> Decision:
    """What `--strict` and a policy that nothing measured can fail make of it."""
    gates = [{"metric": "asr", "max": least, "attack": "worst_case"}]
    policy = Policy.model_validate({"inconclusive": "pass", "gate": gates})
    verdicts = judge_gates(audited.report, policy)
    return decide(audited.report, verdicts, fail_on=policy.reliability.fail_on, strict=True)


@pytest.mark.parametrize("name", PLANTED)
def test_a_fraud_is_flagged_and_passes_no_strict_gate(images: Path, tmp_path: Path, name: str) -> None:
    spec, settings, kinds, code = PLANTED[name]
    audited = _audited(images, tmp_path / "out", spec, settings)
    assert kinds <= audited.ids("error"), audited.report.findings
    assert audited.decide(strict=True).exit_code == code
    assert _strictly(audited).exit_code == code
    assert _strictly(audited, least=0.99).exit_code != 0
    assert (audited.report.status == "error") == (code == 3)
    assert "strict_check_failed" not in audited.ids() or code == 3
    untimed = "out-of-range input, defence"
    assert ("runtime_unmeasured" in audited.ids("warning")) == (name == untimed)
    for found in audited.report.findings:
        assert found.source, found.id
        assert found.advice, found.id
        assert found.threshold is None or found.figure is not None or found.id == "nonfinite_output", found


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_audit_of_the_same_project_passes(images: Path, tmp_path: Path, name: str) -> None:
    spec, settings = HONEST[name]
    audited = _audited(images, tmp_path / "out", spec, settings)
    assert audited.ids("error") == set(), audited.report.findings
    assert _strictly(audited).exit_code == audited.decide(strict=True).exit_code == 0
    assert _strictly(audited).answer == "yes"
    assert "runtime_unmeasured" not in audited.ids()


def test_a_small_budget_that_the_victim_really_resists_passes_too(images: Path, tmp_path: Path) -> None:
    """Robustness that is real, for what was tried: nothing that tries harder breaks it, and nothing is flagged."""
    audited = _audited(images, tmp_path / "out", defense(Dims), {"eps": "1/255"})
    assert {w.asr.value for w in audited.report.worst_case} == {0.0}
    assert audited.ids("error") == set(), audited.report.findings
    assert _strictly(audited, least=0.99).answer == "yes"
