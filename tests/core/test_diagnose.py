"""Every check fires on its fraud, at the size where it should, and is silent on an honest model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from made_cells import NOISE, PGD, THREAT, made_key, made_record
from robustbench_x.diagnose import (
    CellRecord,
    check_attackers,
    check_cell,
    check_pair,
    error_messages,
    probe_gradient,
    probe_victim,
)
from robustbench_x.findings import FINDINGS, finding
from robustbench_x.heads.base import FittedHead
from robustbench_x.plugin import AttackSpec, DefenseSpec
from robustbench_x.randomness import SampleRandom
from robustbench_x.result import Finding
from robustbench_x.testing import toy_victim
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import DefendedEncoder, Shield


def _ids(findings: list[Finding]) -> dict[str, str]:
    return {f.id: f.level for f in findings}


def test_an_honest_cell_is_not_doubted() -> None:
    assert check_cell(made_record()) == []


def _late(n: int, value: Any, usual: Any) -> np.ndarray:
    """`usual` everywhere but in the last quarter."""
    values: np.ndarray = np.where(np.arange(40) >= 40 - n, value, usual)
    return values


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (made_record(error=_late(1, True, False)), {"sample_errors": "error"}),
        (made_record(error=np.ones(40, dtype=bool)), {"sample_errors": "error"}),
        (made_record(clean_pred=(np.arange(40) + 1) % 4), {"nothing_to_attack": "error"}),
        (
            made_record(clean_pred=np.zeros(40, dtype=int), fooled=5),
            {"constant_prediction": "error", "chance_head": "warning", "few_samples": "note"},
        ),
        (made_record(clean_pred=np.arange(40) // 10, fooled=5), {"chance_head": "warning", "few_samples": "note"}),
        (made_record(20, fooled=10), {"few_samples": "note"}),
        (replace(made_record(), overrun=_late(1, 1e-3, 0.0)), {"budget_overrun": "error"}),
        (replace(made_record(), overrun=_late(1, 1e-7, 0.0)), {}),
        (made_record(moved=0.0), {"idle_attack": "error"}),
        (made_record(moved=1e-4), {"idle_attack": "error"}),
        (made_record(moved=0.0, forwards=np.zeros(40)), {"idle_attack": "error"}),
        (made_record(linf=_late(4, 0.0, 8 / 255)), {}),
        (made_record(linf=_late(6, 0.0, 8 / 255)), {"idle_attack": "error"}),
        (made_record(fooled=40, moved=0.0), {}),
        (made_record(moved=0.0, spec=replace(PGD, budget=False)), {"idle_attack": "warning"}),
        (made_record(moved=0.0, spec=replace(PGD, budget=False), forwards=np.zeros(40)), {"idle_attack": "error"}),
        (made_record(adv8_pred=np.arange(40) % 4), {"eight_bit_loss": "note"}),
        (made_record(moved=0.0, cell=made_key(threat=ThreatModel(eps=0.0))), {}),
        (made_record(moved=0.01, cell=made_key(threat=ThreatModel(norm="l2", eps=2.0))), {"idle_attack": "error"}),
        (made_record(moved=0.05, cell=made_key(threat=ThreatModel(norm="l2", eps=2.0))), {}),
        (made_record(moved=1e-3, cell=made_key(threat=ThreatModel(norm="patch", eps=0.1))), {"idle_attack": "error"}),
    ],
)
def test_a_cell_is_doubted_for_what_its_rows_show(record: CellRecord, expected: dict[str, str]) -> None:
    assert _ids(check_cell(record)) == expected
    assert all(f.cell == record.cell.id for f in check_cell(record))


def test_a_single_class_is_nothing_to_attack() -> None:
    record = replace(made_record(classes=2, fooled=0), num_classes=1)
    assert "nothing_to_attack" in _ids(check_cell(record))


def test_chance_is_what_a_constant_would_score() -> None:
    """Nine in ten of one class: an accuracy of 0.9 is no achievement, though there are ten classes."""
    label = np.where(np.arange(40) < 36, 0, 1 + np.arange(40) % 3)
    assert "chance_head" in _ids(check_cell(made_record(label=label, clean_pred=_late(4, 0, label), fooled=0)))


def _pair(broken: list[int], noise: list[int], **changes: Any) -> list[Finding]:
    cell = made_key(**changes.pop("cell", {}))
    kind: Literal["noise", "bpda"] = changes.pop("kind", "noise")

    def record(which: list[int], spec: AttackSpec, margin: float) -> CellRecord:
        label = np.arange(40) % 4
        adversarial = np.where(np.isin(np.arange(40), which), (label + 1) % 4, label)
        made = made_record(spec=spec, cell=cell, adv_pred=adversarial)
        return replace(made, margin=np.where(adversarial == label, margin, -margin))

    mine = record(broken, changes.get("spec", PGD), changes.get("margin", 1.0))
    return check_pair(mine, record(noise, NOISE, changes.get("noise_margin", 2.0)), kind)


def test_an_attack_that_beats_noise_is_not_doubted() -> None:
    assert _pair(list(range(20)), [1, 2]) == []


def test_an_attack_that_loses_to_noise_is_an_error() -> None:
    assert _ids(_pair([], list(range(10)))) == {"weaker_than_noise": "error"}


@pytest.mark.parametrize(
    "changes",
    [
        {"cell": {"defense": "x", "knowledge": "oblivious"}},
        {"cell": {"defense": "x", "knowledge": "bpda"}},
        {"spec": replace(PGD, access="encoder")},
    ],
)
def test_an_attacker_blind_to_head_or_defence_may_lose_to_noise(changes: dict[str, Any]) -> None:
    assert _ids(_pair([], list(range(10)), **changes)) == {"weaker_than_noise": "warning"}
    assert _pair(list(range(20)), [30], **changes) == []


def test_samples_that_noise_alone_breaks_are_a_warning() -> None:
    assert _ids(_pair(list(range(20)), [30])) == {"noise_breaks_others": "warning"}


@pytest.mark.parametrize("margin", [2.0, 3.0])
def test_margins_no_better_than_after_noise_are_an_error(margin: float) -> None:
    assert _ids(_pair([], [], margin=margin)) == {"no_better_than_noise": "error"}
    bpda = {"defense": "x", "knowledge": "bpda"}
    assert _ids(_pair([], [], margin=margin, cell=bpda)) == {"no_better_than_noise": "warning"}


@pytest.mark.parametrize(
    "changes",
    [
        {"cell": {"defense": "x", "knowledge": "oblivious"}},
        {"spec": replace(PGD, budget=False)},
        {"spec": replace(PGD, access="encoder")},
        {"spec": replace(PGD, access="scores")},
    ],
)
def test_margins_are_asked_of_adaptive_gradient_attacks_only(changes: dict[str, Any]) -> None:
    assert _pair([], [], margin=3.0, **changes) == []


def test_five_resisting_samples_say_nothing_about_margins() -> None:
    assert _pair(list(range(35)), [], margin=3.0) == []
    assert _pair(list(range(34)), [], margin=3.0) != []


def test_bpda_that_beats_full_is_a_warning() -> None:
    assert _ids(_pair([], list(range(8)), kind="bpda")) == {"bpda_beats_full": "warning"}
    assert _pair([1], [1, 2], kind="bpda") == []


def test_the_attackers_together_must_be_evidence() -> None:
    noise, attack = made_record(spec=NOISE, cell=made_key(attack="noise")), made_record()
    assert check_attackers([noise, attack], "w") == []
    assert _ids(check_attackers([noise], "w")) == {"only_controls": "error"}
    nothing = replace(attack, cell=made_key(threat=ThreatModel(eps=0.0)))
    assert _ids(check_attackers([noise, nothing], "w")) == {"zero_budget": "error"}
    blind = replace(attack, cell=made_key(defense="x", knowledge="oblivious"))
    aware = replace(attack, cell=made_key(defense="x", knowledge="bpda"))
    assert _ids(check_attackers([blind], "w")) == {"no_adaptive_attack": "error"}
    assert _ids(check_attackers([blind, aware], "w")) == {"short_ladder": "warning"}


def test_messages_are_counted() -> None:
    assert error_messages([None, "b", "a", "b", None, "c"]) == ("b", "a", "c")


def _see(act: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[Tensor], Tensor]:
    """Logits of the toy victim, changed by `act`."""
    victim = toy_victim()
    return lambda images: act(victim.head(victim.encoder(images)))


def _gradient(see: Callable[[Tensor], Tensor], *, loss: str = "margin", threat: ThreatModel = THREAT) -> dict[str, str]:
    return _ids(probe_gradient(toy_victim().images[:8], see, threat, loss=loss, honest=True))


@pytest.mark.parametrize(
    "threat",
    [THREAT, ThreatModel(eps=0.5 / 255), ThreatModel(norm="l2", eps=0.5), ThreatModel(norm="patch", eps=0.1)],
    ids=str,
)
def test_an_honest_gradient_is_not_doubted(threat: ThreatModel) -> None:
    assert _gradient(_see(), threat=threat) == {}
    assert _gradient(toy_victim().encoder, loss="cosine", threat=threat) == {}


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda x: x.detach(), "broken_graph"),
        (lambda x: x.detach() + torch.zeros_like(x, requires_grad=True), "broken_graph"),
        (lambda x: x.detach() + 0 * x, "zero_gradient"),
        (lambda x: x + (x - x.detach()).abs().sqrt() * 0, "nonfinite_gradient"),
        (lambda x: x.detach() - (x - x.detach()), "misleading_gradient"),
        (lambda x: x * 1e6, "saturated_loss"),
    ],
)
def test_a_masked_gradient_is_named(act: Callable[[Tensor], Tensor], expected: str) -> None:
    assert set(_gradient(_see(act))) == {expected}


def _bent(images: Tensor, bend: float) -> Tensor:
    """Logits that rise at the probe point, and whose slope is `bend` times as much away within the probe's step."""
    start = THREAT.start(toy_victim().images[:8], SampleRandom(range(8), device=images.device))
    rise = (images - start).flatten(1).mean(dim=1) / (THREAT.radius / 16)
    return torch.stack([5 + rise - bend * rise**3, 0 * rise], dim=1)


def _backwards(logits: Tensor) -> Tensor:
    return 2 * logits.detach() - logits


def test_curvature_at_the_whole_step_is_no_forgery() -> None:
    assert _gradient(lambda x: _bent(x, bend=6)) == {}
    # Seven times as steep the other way at the whole step, and never what is promised at a finer one.
    assert _gradient(lambda x: _backwards(_bent(x, bend=-6))) == {"misleading_gradient": "error"}


@pytest.mark.parametrize("rate", [1e4, 3e4, 1e5])
def test_a_ripple_is_shattered_even_where_finer_steps_resolve_it(rate: float) -> None:
    see = _see()
    assert set(_gradient(lambda x: see((x + 0.01 * torch.sin(rate * x)).clamp(0, 1)))) >= {"misleading_gradient"}


def test_a_foreign_gradient_is_doubted_only_where_it_claims_to_be_the_true_one() -> None:
    see, images = _see(lambda x: x.detach() - (x - x.detach())), toy_victim().images[:8]
    assert probe_gradient(images, see, THREAT, loss="margin", honest=False) == []


def _victim(defense: Any = None, *, stochastic: bool = False) -> DefendedEncoder:
    spec = DefenseSpec(name="x", summary="s", factory=type(defense), source="s", stochastic=stochastic)
    shield = None if defense is None else Shield(spec=spec, defense=defense)
    return DefendedEncoder(encoder=toy_victim().encoder, shield=shield)


class _Applies:
    """A defence from a function."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        self.apply = act


def _probe(victim: DefendedEncoder, act: Callable[[Tensor], Tensor] | None = None) -> dict[str, str]:
    toy = toy_victim()
    head = toy.head

    class _Top(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            logits: Tensor = toy.head(features)
            return logits if act is None else act(logits)

    head = FittedHead(name="h", layer=_Top(), num_classes=5, aliases={})
    return _ids(probe_victim(toy.images, victim, head))


def test_an_honest_victim_is_not_doubted() -> None:
    assert _probe(_victim()) == {}
    assert _probe(_victim(_Applies(lambda x: x.mul(0.9)))) == {}


def _jitter(images: Tensor) -> Tensor:
    return (images + 0.1 * torch.randn_like(images)).clamp(0, 1)


@pytest.mark.parametrize(
    ("victim", "act", "expected"),
    [
        (_victim(), lambda x: x.softmax(dim=1), "not_logits"),
        (_victim(), lambda x: x / 0, "nonfinite_output"),
        (_victim(_Applies(lambda x: x * torch.nan)), None, "nonfinite_output"),
        (_victim(_Applies(_jitter)), None, "undeclared_randomness"),
        (_victim(_Applies(lambda x: (x - x.mean(dim=0) + 0.5).clamp(0, 1))), None, "batch_dependence"),
    ],
)
def test_a_dishonest_victim_is_named(
    victim: DefendedEncoder, act: Callable[[Tensor], Tensor] | None, expected: str
) -> None:
    assert _probe(victim, act) == {expected: "error"}


def test_declared_randomness_is_no_fault() -> None:
    assert _probe(_victim(_Applies(_jitter), stochastic=True)) == {}


def test_every_kind_says_what_to_do() -> None:
    for name, kind in FINDINGS.items():
        assert kind.title, name
        assert kind.advice.endswith("."), name
        assert kind.source, name
        assert kind.measured.endswith("."), name
        assert finding(name, "m", "c") == Finding(
            id=name,
            level=kind.level,
            message="m",
            cell="c",
            threshold=kind.threshold,
            source=kind.source,
            advice=kind.advice,
        )
