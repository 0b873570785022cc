"""Native attacks: the linear model's known optimum, the loop's promises, APGD's schedule, the losses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbench_x.errors import AttackError, ConfigError
from robustbench_x.plugin import AttackSpec
from robustbench_x.registry import load_registry
from robustbench_x.testing import ToyVictim, linear_victim, make_view, toy_victim
from robustbench_x.threat import Norm, ThreatModel
from robustbench_x.views import Meter
from robustbench_x_attacks import losses
from robustbench_x_attacks.steps import _checkpoints

REGISTRY = load_registry()
NATIVE = [n for n, s in REGISTRY.attacks.items() if not n.startswith("torchattacks:") and s.access == "whitebox"]
LINEAR_PARAMS: dict[str, dict[str, object]] = {"apgd_t": {"loss": "ce"}, "autoattack": {"steps": 20, "queries": 50}}
"""The targeted DLR loss needs four classes; the linear oracle has two."""


def _one(victim: ToyVictim, i: int) -> ToyVictim:
    return replace(victim, images=victim.images[i : i + 1], labels=victim.labels[i : i + 1])


def _attack(spec: AttackSpec, victim: ToyVictim, threat: ThreatModel, **params: object) -> Tensor:
    images: Tensor = spec.build(params).run(make_view(spec.access, victim, threat))
    return threat.project(images, victim.images)


def _wrong(victim: ToyVictim, images: Tensor) -> Tensor:
    with torch.no_grad():
        wrong: Tensor = victim.logits(images).argmax(dim=1) != victim.labels
    return wrong


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NATIVE)
def test_reaches_the_optimum_of_a_linear_model_within_five_percent(name: str, norm: Norm) -> None:
    victim, weight = linear_victim()
    with torch.no_grad():
        logits = victim.logits(victim.images)
    dual = weight.abs().sum() if norm == "linf" else weight.norm()
    for i, optimum in enumerate(((logits[:, 1] - logits[:, 0]).abs() / dual).tolist()):
        alone = _one(victim, i)
        params = LINEAR_PARAMS.get(name, {})
        enough = _attack(REGISTRY.attacks[name], alone, ThreatModel(norm=norm, eps=1.05 * optimum), **params)
        short = _attack(REGISTRY.attacks[name], alone, ThreatModel(norm=norm, eps=0.95 * optimum), **params)
        assert _wrong(alone, enough).all(), f"{name} misses at 1.05 x the optimum {optimum:.3g}"
        assert not _wrong(alone, short).any(), "beats the optimum: the oracle is wrong"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_embed_moves_linear_features_as_far_as_can_be(norm: Norm) -> None:
    """With pixels as features and squared distance, the farthest point of the budget is known: its surface."""
    victim, _ = linear_victim()
    threat = ThreatModel(norm=norm, eps=0.02 if norm == "linf" else 0.5)
    images = _attack(REGISTRY.attacks["embed"], victim, threat, loss="l2")
    moved = (images - victim.images).flatten(1).norm(dim=1)
    best = threat.eps * (victim.images[0].numel() ** 0.5 if norm == "linf" else 1.0)
    assert (moved >= best / 1.05).all(), f"moved {float(moved.min()):.3g} of {best:.3g}"


@pytest.mark.parametrize("layer", ["", "early", "late"])
@pytest.mark.parametrize("rule", ["pgd", "mi", "apgd"])
def test_embed_pushes_any_layer_further_than_noise(layer: str, rule: str) -> None:
    victim, threat = toy_victim(), ThreatModel(eps=8 / 255)

    def distance(images: Tensor) -> Tensor:
        view = make_view("encoder", victim, threat)
        with torch.no_grad():
            pair = [losses.feature_maps(view.encoder, x, layer) for x in (images, victim.images)]  # type: ignore[attr-defined]
        return losses.feature_cosine(*pair)

    attacked = distance(_attack(REGISTRY.attacks["embed"], victim, threat, layer=layer, rule=rule))
    noisy = distance(_attack(REGISTRY.attacks["noise"], victim, threat))
    assert (attacked > noisy).all()


def test_embed_names_the_layers_it_could_use() -> None:
    with pytest.raises(AttackError, match="no layer 'middle'; it has early, late"):
        _attack(REGISTRY.attacks["embed"], toy_victim(), ThreatModel(eps=0.1), layer="middle")


@pytest.mark.parametrize("name", NATIVE)
def test_fooled_samples_stop_costing(name: str) -> None:
    victim, threat = toy_victim(), ThreatModel(eps=32 / 255)
    spent = {}
    for exhaustive in (False, True):
        meter = Meter()
        spec = REGISTRY.attacks[name]
        images = spec.build().run(make_view(spec.access, victim, threat, exhaustive=exhaustive, meter=meter))
        assert _wrong(victim, threat.project(images, victim.images)).all()
        spent[exhaustive] = meter.backwards
    assert spent[False] < 0.5 * spent[True]


def test_exhaustive_pgd_spends_exactly_its_steps() -> None:
    victim, meter = toy_victim(), Meter()
    view = make_view("whitebox", victim, ThreatModel(eps=4 / 255), exhaustive=True, meter=meter)
    REGISTRY.attacks["pgd"].build({"steps": 7}).run(view)
    assert (meter.forwards, meter.backwards) == (7 * 12, 7 * 12)


def test_pgd_returns_the_best_iterate_not_the_last() -> None:
    """A model that is fooled only in a thin shell: the walk crosses it and leaves it again."""
    images = torch.full((1, 3, 4, 4), 0.5)
    start_sum = float(images.sum())

    def logits(pixels: Tensor) -> Tensor:
        moved = (pixels.flatten(1).sum(dim=1) - start_sum) / 48
        inside = torch.exp(-(((moved - 0.05) / 0.01) ** 2))
        return torch.stack([0 * moved, 2 * inside - 1 + 0.5 * moved], dim=1)

    from robustbench_x.randomness import SampleRandom
    from robustbench_x.views import ModelHandle, WhiteboxView

    view = WhiteboxView(
        inputs=images,
        threat=ThreatModel(eps=0.2),
        random=SampleRandom([0]),
        exhaustive=True,
        labels=torch.zeros(1, dtype=torch.long),
        model=ModelHandle(logits, Meter()),
        num_classes=2,
    )
    result = REGISTRY.attacks["pgd"].build({"steps": 9, "step_size": 0.0234, "random_start": False}).run(view)
    assert logits(result).argmax() == 1


def test_restarts_never_fool_fewer() -> None:
    victim, threat = toy_victim(num_images=24), ThreatModel(eps=3 / 255)
    once = _wrong(victim, _attack(REGISTRY.attacks["pgd"], victim, threat, steps=3))
    often = _wrong(victim, _attack(REGISTRY.attacks["pgd"], victim, threat, steps=3, restarts=5))
    assert (often | ~once).all()


def test_apgd_is_no_weaker_than_pgd_and_t_no_weaker_than_ce() -> None:
    victim, threat = toy_victim(num_images=40, num_classes=8), ThreatModel(eps=3 / 255)
    counts = {
        name: int(_wrong(victim, _attack(REGISTRY.attacks[name], victim, threat)).sum())
        for name in ("noise", "pgd", "apgd_ce", "apgd_t")
    }
    assert counts["noise"] < counts["pgd"] <= counts["apgd_ce"] + 1
    assert counts["apgd_ce"] <= counts["apgd_t"] + 1


def test_apgd_checkpoints_are_those_of_the_paper() -> None:
    """p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06); w_j = ceil(p_j N)."""
    marks, p = [0], [0.0, 0.22]
    while p[-1] <= 1:
        marks.append(int(np.ceil(round(p[-1] * 100, 6))))
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    got = _checkpoints(100)
    assert [m for m in sorted(got) if m < 100] == [m for m in marks[1:] if m < 100]
    assert all(got[b] == b - a for a, b in zip(sorted(got), sorted(got)[1:], strict=False))


def test_apgd_t_works_on_two_and_three_classes() -> None:
    two, _ = linear_victim()
    for victim in (two, toy_victim(num_classes=3)):
        threat = ThreatModel(eps=16 / 255)
        fooled = []
        for name in ("pgd", "apgd_t"):
            images = _attack(REGISTRY.attacks[name], victim, threat)
            with torch.no_grad():
                fooled.append(int((victim.logits(images).argmax(dim=1) != victim.labels).sum()))
        assert fooled[1] >= fooled[0] > 0


def test_the_lead_is_what_the_targeted_dlr_loss_divides() -> None:
    logits, labels, targets = _logits()
    ordered = logits.sort(dim=1, descending=True).values
    gap = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    assert torch.allclose(losses.lead(logits, labels, targets) / gap, losses.dlr_targeted(logits, labels, targets))


def _logits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, 6, generator=generator)
    labels = torch.randint(0, 6, (9,), generator=generator)
    return logits, labels, (labels + 2) % 6


def test_losses_agree_with_loops() -> None:
    logits, labels, targets = _logits()
    for i in range(len(logits)):
        z, y, t = logits[i].double().tolist(), int(labels[i]), int(targets[i])
        ordered = sorted(z, reverse=True)
        total = sum(np.exp(v) for v in z)
        others = max(v for k, v in enumerate(z) if k != y)
        one = (logits[i : i + 1], labels[i : i + 1])
        assert float(losses.cross_entropy(*one)) == pytest.approx(np.log(total) - z[y], abs=1e-5)
        assert float(losses.margin(*one)) == pytest.approx(others - z[y], abs=1e-5)
        assert float(losses.dlr(*one)) == pytest.approx((others - z[y]) / (ordered[0] - ordered[2]), abs=1e-4)
        target = targets[i : i + 1]
        assert float(losses.cross_entropy_targeted(*one, target)) == pytest.approx(z[t] - np.log(total), abs=1e-5)
        gap = ordered[0] - (ordered[2] + ordered[3]) / 2
        assert float(losses.dlr_targeted(*one, target)) == pytest.approx((z[t] - z[y]) / gap, abs=1e-4)


def test_feature_losses_agree_with_numpy() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 5, 7, generator=generator), torch.randn(4, 5, 7, generator=generator)
    for i in range(4):
        x, y = a[i].double().numpy(), b[i].double().numpy()
        cosines = [1 - (u @ v) / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(x, y, strict=True)]
        assert float(losses.feature_cosine(a, b)[i]) == pytest.approx(np.mean(cosines), abs=1e-5)
        assert float(losses.feature_l2(a, b)[i]) == pytest.approx(((x - y) ** 2).mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stepz": 5}, "no parameter 'stepz'; did you mean steps"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"loss": "hinge"}, "pgd.loss='hinge'"),
        ({"steps": "many"}, "pgd.steps='many'"),
    ],
)
def test_a_wrong_parameter_is_one_sentence(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        REGISTRY.attacks["pgd"].build(params)


def test_a_step_size_may_be_a_fraction() -> None:
    assert REGISTRY.attacks["pgd"].build({"step_size": "2/255"}).step_size == pytest.approx(2 / 255)
