"""The checks of honest evaluation beyond a single cell: each fires on its fraud and is silent on an honest victim."""

import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import grad as imported_grad

import robustbench_x
from made_cells import NOISE, PGD, made_key, made_record
from robustbench_x.diagnose import (
    CellRecord,
    check_attackers,
    check_budgets,
    check_cell,
    check_control,
    check_draws,
    check_transfer,
    probe_defense,
    probe_loss,
    probe_victim,
)
from robustbench_x.engine.finish import _cost_findings
from robustbench_x.findings import CHECKS, FINDINGS, finding
from robustbench_x.plugin import AttackSpec, DefenseSpec
from robustbench_x.registry import load_registry
from robustbench_x.result import DefenseInfo, Finding
from robustbench_x.testing import toy_victim
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import DefendedEncoder, Shield

TOY = toy_victim()
ATTACKS = load_registry().attacks
Act = Callable[[Tensor], Tensor]


def _levels(findings: list[Finding]) -> dict[str, str]:
    return {f.id: f.level for f in findings}


class _Applies:
    """A defence from a function."""

    def __init__(self, act: Act) -> None:
        self.apply = act


def _victim(act: Act) -> DefendedEncoder:
    spec = DefenseSpec(name="x", summary="s", factory=_Applies, source="s")
    return DefendedEncoder(encoder=TOY.encoder, shield=Shield(spec=spec, defense=_Applies(act)))


def _by_grad(images: Tensor) -> Tensor:
    with torch.enable_grad():
        pixels = images.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad((pixels - 0.5).square().sum(), pixels)
    return (images - 0.1 * gradient).clamp(0, 1)


def _by_imported_grad(images: Tensor) -> Tensor:
    with torch.enable_grad():
        pixels = images.detach().requires_grad_(True)
        (gradient,) = imported_grad((pixels - 0.5).square().sum(), pixels)
    return (images - 0.1 * gradient).clamp(0, 1)


def _by_backward(images: Tensor) -> Tensor:
    with torch.enable_grad():
        pixels = images.detach().requires_grad_(True)
        for _ in range(3):
            (pixels - 0.5).square().sum().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    return (images - 0.03 * pixels.grad).clamp(0, 1)


@pytest.mark.parametrize(("act", "passes"), [(_by_grad, 1), (_by_imported_grad, 1), (_by_backward, 3)])
def test_a_loop_at_inference_is_named(act: Act, passes: int) -> None:
    (found,) = probe_victim(TOY.images, _victim(act), TOY.head)
    assert (found.id, found.level, found.figure) == ("loop_at_inference", "error", passes)


def test_a_victim_that_only_runs_forward_has_no_loop() -> None:
    assert probe_victim(TOY.images, _victim(lambda x: 0.9 * x), TOY.head) == []


def _fails(images: Tensor) -> Tensor:
    _by_grad(images)
    raise ValueError("no loop today")


def test_autograd_is_as_it_was_after_the_loop_probe() -> None:
    names = ("grad", "backward", "_engine_run_backward")
    before = [getattr(torch.autograd, name, None) for name in names]
    probe_victim(TOY.images, _victim(_by_grad), TOY.head)
    with pytest.raises(ValueError, match="no loop today"):
        probe_victim(TOY.images, _victim(_fails), TOY.head)
    assert [getattr(torch.autograd, name, None) for name in names] == before


def _alone(images: Tensor) -> Tensor:
    return images * torch.nan if len(images) == 1 else images


class _NaNLater:
    """Honest at the first call, NaN at the next ones."""

    def __init__(self) -> None:
        self.calls = 0

    def apply(self, images: Tensor) -> Tensor:
        self.calls += 1
        return images if self.calls == 1 else images * torch.nan


def test_nan_that_comes_later_or_alone_is_not_silent() -> None:
    assert _levels(probe_victim(TOY.images, _victim(_alone), TOY.head)) == {"batch_dependence": "error"}
    (found,) = probe_victim(TOY.images, _victim(_NaNLater().apply), TOY.head)
    assert (found.id, found.figure) == ("undeclared_randomness", None), "JSON has no infinity"


def test_a_figure_that_is_no_number_is_not_stored() -> None:
    for figure in (math.nan, math.inf, -math.inf):
        assert finding("unstable_loss", "m", figure=figure).figure is None
    assert finding("unstable_loss", "m", figure=0.5).figure == 0.5


@pytest.mark.parametrize(("classes", "named"), [(2, True), (3, True), (4, False)])
def test_few_classes(classes: int, named: bool) -> None:
    found = [f for f in check_cell(made_record(classes=classes)) if f.id == "few_classes"]
    assert [(f.level, f.figure) for f in found] == ([("note", classes)] if named else [])


def _logits(images: Tensor) -> Tensor:
    return TOY.head(TOY.encoder(images))  # type: ignore[no-any-return]


def _calm(images: Tensor) -> Tensor:
    return 0.01 * _logits(images)


def _shattered(images: Tensor) -> Tensor:
    """Which class leads is decided by the last bits of the pixels."""
    return _calm(images) + 3 * torch.sin(1e5 * images.flatten(1)[:, : TOY.head.num_classes])


def test_a_loss_that_jumps_is_unstable_and_a_smooth_one_is_not() -> None:
    assert probe_loss(TOY.images, _calm, TOY.labels, honest=True) == []
    (found,) = probe_loss(TOY.images, _shattered, TOY.labels, honest=False)
    assert (found.id, found.level) == ("unstable_loss", "warning")
    assert found.figure is not None
    assert found.figure > 0.1
    (milder,) = probe_loss(TOY.images, _shattered, TOY.labels, honest=True)
    assert milder.level == "note"


def test_the_loss_probe_stays_inside_the_pixels_range_and_draws_from_its_own_generator() -> None:
    seen = []

    def see(images: Tensor) -> Tensor:
        seen.append((float(images.min()), float(images.max())))
        return _calm(images)

    state = torch.get_rng_state()
    probe_loss(torch.zeros_like(TOY.images), see, TOY.labels, honest=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert min(low for low, _ in seen) >= 0
    assert len(seen) == 101


@pytest.mark.parametrize(
    "act",
    [
        lambda x: 0.05 * x + 0.95 * x.detach(),
        lambda x: torch.cat([x[:, :, :8], x[:, :, 8:].detach()], dim=2),
        lambda x: x.flip(-1),
        lambda x: x.detach() + 0 * x,
    ],
    ids=["norm", "pixels", "cosine", "nothing"],
)
def test_a_defence_that_swallows_the_gradient_is_named(act: Act) -> None:
    (found,) = probe_defense(TOY.images, act, others=False)
    assert (found.id, found.level, found.threshold) == ("attenuated_gradient", "warning", 0.2)
    assert found.figure is not None
    assert _levels(probe_defense(TOY.images, act, others=True)) == {"attenuated_gradient": "note"}


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x,
        lambda x: 0.8 * x + 0.1,
        lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1),
        lambda x: torch.stack([x, x.flip(-1)], dim=1),  # looks
        lambda x: x.detach(),  # a broken graph, which is named elsewhere
        lambda x: x.detach() * torch.ones(1, requires_grad=True),
        lambda x: x + (x - x.detach()).abs().sqrt(),  # NaN, which is named elsewhere
    ],
    ids=["identity", "affine", "blur", "looks", "detached", "own_weight", "nan"],
)
def test_a_defence_that_passes_gradients_on_is_not_named(act: Act) -> None:
    assert probe_defense(TOY.images, act, others=False) == []


def test_a_defence_of_another_size_is_compared_at_the_images_size() -> None:
    def halved(images: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False)

    assert probe_defense(TOY.images, lambda x: halved(x).detach() + 0 * halved(x), others=False) != []


def _some(count: int, *, of: int = 40) -> np.ndarray:
    """1 on the last `count` of `of` samples, 0 elsewhere."""
    values: np.ndarray = (np.arange(of) >= of - count).astype(float)
    return values


@pytest.mark.parametrize("seen", [1, 4, 5, 10])
def test_a_single_success_that_was_thrown_away_is_an_error(seen: int) -> None:
    (found,) = check_cell(made_record(seen=_some(seen)))
    assert (found.id, found.level, found.figure, found.threshold) == ("silent_success", "error", seen / 40, 0)


def test_what_was_seen_to_fall_and_fell_is_no_silent_success() -> None:
    assert check_cell(made_record(seen=1 - _some(10))) == []
    assert check_cell(made_record(fooled=40, seen=1.0)) == []
    assert check_cell(made_record()) == [], "nobody watched"


def test_gains_at_the_end_are_unconverged() -> None:
    def made(count: int, gain: float = 0.2, **changes: Any) -> dict[str, str]:
        return _levels(check_cell(made_record(seen=0.0, late=gain * _some(count), **changes)))

    assert made(2) == {"unconverged": "warning"}
    assert made(1) == {}, "a tenth of what resists"
    assert made(10, gain=0.05) == {}
    assert made(10, spec=replace(PGD, access="scores")) == {}, "a random search always may still gain"
    assert made(40, fooled=40) == {}


def _broken(which: range | list[int], *, spec: AttackSpec = PGD, n: int = 40, **cell: Any) -> CellRecord:
    label = np.arange(n) % 4
    adversarial = np.where(np.isin(np.arange(n), list(which)), (label + 1) % 4, label)
    return made_record(n, spec=spec, cell=made_key(**cell), adv_pred=adversarial)


@pytest.mark.parametrize(
    "weak",
    [
        {"spec": NOISE, "attack": "noise"},
        {"spec": ATTACKS["square"], "attack": "square"},
        {"spec": replace(PGD, access="encoder"), "attack": "embed"},
    ],
    ids=lambda weak: weak["attack"],
)
def test_samples_that_only_the_blind_break_are_an_inversion(weak: dict[str, Any]) -> None:
    strong = _broken(range(20))
    (found,) = check_attackers([_broken([0, 38, 39], **weak), strong], "w")
    assert (found.id, found.level, found.figure, found.cell) == ("inversion", "error", 2 / 40, "w")
    assert weak["attack"] in found.message
    assert _levels(check_attackers([_broken([0, 39], **weak), strong], "w")) == {"inversion": "warning"}
    assert check_attackers([_broken([0, 1, 2], **weak), strong], "w") == []
    rescued = _broken([38, 39], attack="apgd_ce")
    assert check_attackers([_broken([38, 39], **weak), strong, rescued], "w") == []


def test_oblivious_gradients_may_invert_and_bpda_may_not() -> None:
    full = _broken(range(20), defense="x", knowledge="full")
    blind = _broken([37, 38, 39], defense="x", knowledge="oblivious")
    bpda = _broken([37, 38, 39], defense="x", knowledge="bpda")
    assert "inversion" in _levels(check_attackers([full, blind], "w"))
    assert "inversion" not in _levels(check_attackers([full, bpda], "w")), "check 21 is about that"


def test_a_curve_that_rises_is_an_error() -> None:
    def at(eps: float, broken: int) -> list[CellRecord]:
        return [_broken(range(broken), threat=ThreatModel(eps=eps))]

    (found,) = check_budgets([at(0.01, 30), at(0.02, 10)], "w")
    assert (found.id, found.level, found.cell) == ("rising_curve", "error", "w")
    assert found.figure is not None
    assert found.figure > 2
    assert check_budgets([at(0.01, 10), at(0.02, 30)], "w") == []
    assert check_budgets([at(0.01, 20), at(0.02, 20)], "w") == []
    assert check_budgets([at(0.01, 20), at(0.02, 18)], "w") == [], "within chance"
    assert check_budgets([at(0.01, 20)], "w") == []
    (sure,) = check_budgets([at(0.01, 40), at(0.02, 0)], "w")
    assert sure.figure == 40, "no spread at all"


def test_a_curve_is_that_of_the_worst_case() -> None:
    small, large = ThreatModel(eps=0.01), ThreatModel(eps=0.02)
    before = [_broken(range(20), threat=small)]
    after = [_broken([], threat=large), _broken(range(30), threat=large, attack="apgd_ce")]
    assert check_budgets([before, after], "w") == []


def test_an_attack_that_loses_to_the_bare_victim_is_a_weak_control() -> None:
    behind = _broken(range(10), defense="x", knowledge="full")
    (found,) = check_control(behind, _broken(range(30)))
    assert (found.id, found.level, found.figure, found.cell) == ("weak_control", "warning", 0.75, behind.cell.id)
    assert check_control(behind, _broken(range(38))) == [], "95 %"
    assert check_control(behind, _broken(range(10))) == [], "the defence takes nothing away"
    unjudged = made_record(error=np.ones(40, dtype=bool))
    assert check_control(behind, unjudged) == []


def test_images_that_do_not_transfer_to_the_defence() -> None:
    behind = _broken(range(10), defense="x", knowledge="oblivious")
    (found,) = check_transfer(behind, _broken(range(40)))
    assert (found.id, found.level, found.figure) == ("transfer_failure", "note", 0.75)
    assert check_transfer(behind, _broken(range(5))) == []
    assert check_transfer(behind, _broken([])) == []


@pytest.mark.parametrize(("draws", "level"), [(1, "error"), (2, "warning"), (19, "warning"), (20, None)])
def test_a_random_defence_needs_many_draws(draws: int, level: str | None) -> None:
    found = check_draws([_broken([])], draws, stochastic=True, where="w")
    assert [(f.id, f.level, f.figure) for f in found] == ([] if level is None else [("few_draws", level, draws)])
    assert check_draws([_broken([])], draws, stochastic=False, where="w") == []
    assert check_draws([_broken([], spec=NOISE)], draws, stochastic=True, where="w") == []


def _ladder() -> Iterator[CellRecord]:
    def at(level: str) -> dict[str, Any]:
        return {"defense": "x", "knowledge": level}

    for level in ("oblivious", "bpda", "bpda_learned", "full"):
        yield _broken(range(20), **at(level))
    yield _broken([0], spec=ATTACKS["square"], attack="square", **at("full"))
    yield _broken([0], spec=ATTACKS["transfer"], attack="transfer", **at("oblivious"))
    yield _broken([0], spec=ATTACKS["advencoder"], attack="advencoder", **at("full"))


def test_a_defence_that_met_the_whole_ladder_is_not_doubted() -> None:
    assert check_attackers(list(_ladder()), "w") == []


def test_every_rung_that_is_missing_is_named() -> None:
    whole = list(_ladder())
    for left_out, name in enumerate(
        ("oblivious", "bpda", "bpda_learned", "full", "black box", "transfer", "universal")
    ):
        (found,) = check_attackers([r for i, r in enumerate(whole) if i != left_out], "w")
        assert (found.id, found.level, found.figure) == ("short_ladder", "warning", 1)
        assert found.message.endswith(f": {name}"), found.message


def test_a_defence_that_nobody_could_time_is_named() -> None:
    known = {"encoder": "e", "data": "d", "name": "x", "params": {}, "gradient": "exact"}
    flags: dict[str, Any] = {"stochastic": False, "detects": False}
    timed = DefenseInfo(**known, **flags, defense="quick", seconds=0.1, encoder_seconds=0.1)
    failed = DefenseInfo(**known, **flags, defense="x", seconds=None, encoder_seconds=0.1)
    records = {
        record.cell.id: record
        for record in (
            made_record(cell=made_key(defense="x", knowledge="full")),
            made_record(cell=made_key(defense="quick", knowledge="full")),
            made_record(cell=made_key(defense="x", knowledge="full", data="other")),
        )
    }
    (found,) = _cost_findings([timed, failed], records)
    assert (found.id, found.level, found.cell) == ("runtime_unmeasured", "warning", "e | d | x")
    assert found.applies_to == (next(iter(records)),)


@pytest.fixture(scope="module")
def code() -> list[tuple[Path, ast.AST]]:
    """Every node of every module of the package that raises a finding."""
    texts = {p: p.read_text(encoding="utf-8") for p in Path(robustbench_x.__file__).parent.rglob("*.py")}
    return [(p, node) for p, text in texts.items() if "finding(" in text for node in ast.walk(ast.parse(text))]


def test_every_kind_is_raised_somewhere(code: list[tuple[Path, ast.AST]]) -> None:
    texts = {node.value for _, node in code if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(FINDINGS) - texts == set()


def test_only_kinds_of_the_catalogue_are_raised_and_each_says_its_figure(code: list[tuple[Path, ast.AST]]) -> None:
    calls = [
        (path, node)
        for path, node in code
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "finding"
    ]
    assert len(calls) > 40
    for path, call in calls:
        kind = call.args[0]
        if isinstance(kind, ast.Constant):
            assert kind.value in FINDINGS, f"{path}:{call.lineno}"
            if FINDINGS[str(kind.value)].threshold is None:
                continue
        named = {keyword.arg for keyword in call.keywords}
        assert "figure" in named, f"{path}:{call.lineno}: a kind with a threshold is raised without its figure"


def test_every_check_has_a_kind_or_holds_by_construction() -> None:
    numbers = {kind.check for kind in FINDINGS.values()} - {None}
    assert set(CHECKS) == set(range(1, 30))
    assert set(CHECKS) - numbers == {28}
    assert numbers <= set(CHECKS)
    assert "by construction" in CHECKS[28]
