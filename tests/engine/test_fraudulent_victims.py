"""Negative controls: defences and models that look robust and are not. None may end as evidence of robustness."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from project import NATIVE, PGD, Audited, audit, audit_config, defense, value
from robustbench_x.plugin import DefenseSpec, param


@dataclass(frozen=True, kw_only=True)
class ZeroGradient:
    """The images, with a graph that multiplies every gradient by 0."""

    def apply(self, images: Tensor) -> Tensor:
        return images.detach() + 0 * images


@dataclass(frozen=True, kw_only=True)
class Detached:
    """The images, cut off the graph."""

    def apply(self, images: Tensor) -> Tensor:
        return images.detach()


class _Backwards(torch.autograd.Function):
    """The identity with the gradient's sign turned round."""

    @staticmethod
    def forward(context: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return -gradient


@dataclass(frozen=True, kw_only=True)
class Misleading:
    """The identity, whose gradient points the wrong way."""

    def apply(self, images: Tensor) -> Tensor:
        seen: Tensor = _Backwards.apply(images)
        return seen


@dataclass(frozen=True, kw_only=True)
class AlwaysNaN:
    """NaN for everything."""

    def apply(self, images: Tensor) -> Tensor:
        return images * torch.nan


def _off_grid(images: Tensor) -> Tensor:
    """Which images no 8-bit file could hold, `(N, 1, 1, 1)`: a cheap way to tell perturbed ones."""
    levels = images * 255
    return (levels - levels.round()).abs().amax(dim=(1, 2, 3), keepdim=True) > 1e-3


@dataclass(frozen=True, kw_only=True)
class NaNWhenPerturbed:
    """Honest on clean images, NaN on all others."""

    def apply(self, images: Tensor) -> Tensor:
        return torch.where(_off_grid(images), images * torch.nan, images)


@dataclass(frozen=True, kw_only=True)
class Undeclared:
    """Adds noise and says nothing about it."""

    size: float = param(0.1, "standard deviation")

    def apply(self, images: Tensor) -> Tensor:
        return (images + self.size * torch.randn_like(images)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class UndeclaredOffGrid:
    """Adds noise to what is no 8-bit image, and says nothing about it."""

    def apply(self, images: Tensor) -> Tensor:
        noisy = (images + 0.3 * torch.randn_like(images)).clamp(0, 1)
        return torch.where(_off_grid(images), noisy, images)


@dataclass(frozen=True, kw_only=True)
class FewerImages:
    """Drops the last image of every batch."""

    def apply(self, images: Tensor) -> Tensor:
        return images[:-1]


@dataclass(frozen=True, kw_only=True)
class NoImages:
    """Returns a list."""

    def apply(self, images: Tensor) -> Tensor:
        return list(images)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class OutOfRange:
    """Leaves [0, 1]."""

    def apply(self, images: Tensor) -> Tensor:
        return images * 2


@dataclass(frozen=True, kw_only=True)
class Overwrites:
    """Paints the very tensor it is given grey."""

    def apply(self, images: Tensor) -> Tensor:
        return images.mul_(0.0).add_(0.5)


@dataclass(frozen=True, kw_only=True)
class BatchMean:
    """Centres the batch, so that an image's fate hangs on its neighbours."""

    def apply(self, images: Tensor) -> Tensor:
        return (images - images.mean(dim=0, keepdim=True) * (len(images) > 1) * 0.9 + 0.4).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Exits:
    """Ends the process with a success."""

    def apply(self, images: Tensor) -> Tensor:
        raise SystemExit(0)


def _run(images: Path, out: Path, spec: DefenseSpec, **settings: Any) -> Audited:
    return audit(audit_config(images, defenses=[spec.name], **settings), out, spec)


def _assert_not_green(audited: Audited, kinds: set[str], *, code: int) -> None:
    """The kinds are there as errors, and neither --strict nor the mildest policy lets it pass."""
    assert kinds <= audited.ids("error"), audited.report.findings
    assert audited.decide(strict=True).exit_code == code
    assert audited.lenient_gate().exit_code == code
    assert (audited.report.status == "error") == (code == 3)


@pytest.mark.parametrize(
    ("factory", "kinds"),
    [
        (ZeroGradient, {"zero_gradient", "no_better_than_noise"}),
        (Detached, {"broken_graph"}),
        (Misleading, {"misleading_gradient", "no_better_than_noise"}),
    ],
)
def test_a_masked_gradient_is_named_and_bpda_goes_around_it(
    images: Path, tmp_path: Path, factory: type, kinds: set[str]
) -> None:
    audited = _run(images, tmp_path / "out", defense(factory))
    name = factory.__name__.lower()
    code = 3 if factory is Detached else 4
    _assert_not_green(audited, kinds, code=code)
    assert value(audited.cell("pgd", defense=name, knowledge="bpda"), "asr") > 0.9
    worst = next(w for w in audited.report.worst_case if w.defense == name)
    assert worst.robust_accuracy.value == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("factory", [ZeroGradient, Misleading])
def test_a_masked_gradient_is_named_when_bpda_is_not_allowed(images: Path, tmp_path: Path, factory: type) -> None:
    """The only attack that knows the defence fails: robust accuracy is high, and said to be worthless."""
    audited = _run(images, tmp_path / "out", defense(factory), knowledge=["full"])
    _assert_not_green(audited, {"no_better_than_noise"}, code=4)
    cell = audited.cell("pgd", defense=factory.__name__.lower())
    assert value(cell, "robust_accuracy") > 0.8
    assert "no_better_than_noise" in {flag.id for flag in cell.flags}


def test_a_defence_that_always_returns_nan_is_never_robust(images: Path, tmp_path: Path) -> None:
    audited = _run(images, tmp_path / "out", defense(AlwaysNaN))
    _assert_not_green(audited, {"sample_errors", "nonfinite_output"}, code=3)
    cell = audited.cell("pgd", defense="alwaysnan", knowledge="oblivious")
    assert cell.n_errors == cell.n
    assert cell.metrics["robust_accuracy"].value is None
    assert value(audited.cell("pgd"), "asr") > 0.9, "the undefended control is not concerned"


def test_a_defence_that_returns_nan_on_perturbed_images_only_is_never_robust(images: Path, tmp_path: Path) -> None:
    audited = _run(images, tmp_path / "out", defense(NaNWhenPerturbed))
    _assert_not_green(audited, {"sample_errors"}, code=3)
    for knowledge in ("oblivious", "bpda", "full"):
        cell = audited.cell("pgd", defense="nanwhenperturbed", knowledge=knowledge)
        assert cell.n_errors == cell.n, knowledge
        assert cell.metrics["robust_accuracy"].value is None
    worst = next(w for w in audited.report.worst_case if w.defense == "nanwhenperturbed")
    assert worst.robust_accuracy.value in (None, 0.0)


def test_undeclared_randomness_is_an_error(images: Path, tmp_path: Path) -> None:
    _assert_not_green(_run(images, tmp_path / "out", defense(Undeclared)), {"undeclared_randomness"}, code=4)


def test_randomness_on_perturbed_images_only_is_an_error_too(images: Path, tmp_path: Path) -> None:
    audited = _run(images, tmp_path / "out", defense(UndeclaredOffGrid), eps=0.0177)
    _assert_not_green(audited, {"undeclared_randomness"}, code=4)


def test_a_declared_random_defence_is_judged_by_the_majority_of_fresh_draws(images: Path, tmp_path: Path) -> None:
    spec = defense(Undeclared, stochastic=True)
    audited = _run(images, tmp_path / "out", spec, attacks=[{**PGD, "eot": 3}])
    assert audited.ids("error") == set()
    full = audited.cell("pgd", defense="undeclared", knowledge="full")
    assert value(full, "backwards_per_sample") > value(audited.cell("pgd"), "backwards_per_sample"), "EOT was used"
    again = _run(images, tmp_path / "again", spec, attacks=[{**PGD, "eot": 3}])
    assert [r["adv_pred"] for r in again.rows] == [r["adv_pred"] for r in audited.rows], "draws are seeded"


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (FewerImages, r"turned images of shape \(\d+, 3, 32, 32\) into \(\d+, 3, 32, 32\)"),
        (NoImages, "returned a list, not a tensor"),
        (OutOfRange, r"pixels must lie in \[0, 1\]"),
        (Exits, "SystemExit"),
    ],
)
def test_a_defence_that_breaks_its_promise_ends_in_error_rows(
    images: Path, tmp_path: Path, factory: type, message: str
) -> None:
    audited = _run(images, tmp_path / "out", defense(factory))
    _assert_not_green(audited, {"sample_errors", "probe_failed"}, code=3)
    name = factory.__name__.lower()
    for cell in audited.report.cells:
        assert cell.n_errors == (cell.n if cell.defense == name else 0), cell.id
    rows = [row for row in audited.rows if row["defense"] == name]
    assert all(re.search(message, row["error"]) for row in rows), rows[0]["error"]


def test_a_defence_that_writes_to_its_input_does_not_change_the_clean_images(images: Path, tmp_path: Path) -> None:
    audited = _run(images, tmp_path / "out", defense(Overwrites))
    plain = audit(audit_config(images), tmp_path / "plain")
    for attack_name in ("noise", "pgd"):
        mine, theirs = audited.cell(attack_name), plain.cell(attack_name)
        assert value(mine, "asr") == value(theirs, "asr")
        assert value(mine, "linf_max") == value(theirs, "linf_max")
    assert "constant_prediction" in audited.ids("error"), "grey images all get one class"


def test_a_defence_that_looks_at_the_batch_is_an_error(images: Path, tmp_path: Path) -> None:
    _assert_not_green(_run(images, tmp_path / "out", defense(BatchMean)), {"batch_dependence"}, code=4)


def test_a_defence_that_nobody_attacks_knowingly_is_doubted(images: Path, tmp_path: Path) -> None:
    audited = _run(images, tmp_path / "out", defense(ZeroGradient), knowledge=["oblivious"])
    assert "no_adaptive_attack" in audited.ids("error")
    assert "no_adaptive_attack" not in _run(images, tmp_path / "aware", defense(ZeroGradient)).ids()


def test_probabilities_are_an_error(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, encoder="python:project:probabilities", head="native", eps=0.08)
    _assert_not_green(audit(config, tmp_path / "out"), {"not_logits"}, code=4)


def test_logits_too_large_for_the_cross_entropy_are_an_error(images: Path, tmp_path: Path) -> None:
    """Defensive distillation: the attack gets no gradient and the model keeps every sample."""
    config = audit_config(images, encoder="python:project:saturated", head="native", eps=0.08)
    audited = audit(config, tmp_path / "out")
    assert value(audited.cell("pgd"), "robust_accuracy") > 0.9
    _assert_not_green(audited, {"no_better_than_noise"}, code=4)
    assert "saturated_loss" in audited.ids("warning")
    honest = audit_config(images, encoder=NATIVE, head="native", eps=0.08)
    assert value(audit(honest, tmp_path / "honest").cell("pgd"), "asr") > 0.9
    margin = audit_config(images, encoder="python:project:saturated", head="native", eps=0.08,
                          attacks=[{**PGD, "loss": "margin"}])  # fmt: skip
    mended = audit(margin, tmp_path / "margin")
    assert value(mended.cell("pgd"), "asr") > 0.9, "the advice of the finding works"
    assert mended.ids("error") == set()


def test_a_model_that_normalises_by_its_batch_is_an_error(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, encoder="python:project:batch_normalised", head="native", eps=0.08)
    assert "batch_dependence" in audit(config, tmp_path / "out").ids("error")


def test_noise_alone_is_no_evidence(images: Path, tmp_path: Path) -> None:
    audited = audit(audit_config(images, attacks=["noise"]), tmp_path / "out")
    _assert_not_green(audited, {"only_controls"}, code=4)


def test_a_budget_of_nothing_is_no_evidence(images: Path, tmp_path: Path) -> None:
    _assert_not_green(audit(audit_config(images, eps=0), tmp_path / "out"), {"zero_budget"}, code=4)


def test_a_patch_smaller_than_a_pixel_is_no_evidence(images: Path, tmp_path: Path) -> None:
    audited = audit(audit_config(images, norm="patch", eps=0.0005), tmp_path / "out")
    _assert_not_green(audited, {"idle_attack"}, code=4)
