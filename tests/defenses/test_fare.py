"""FARE and its kin: the loss and a step by hand, the contract kit, and what training does to an independent attack."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder, Preprocessing, Tokens
from robustbench_x.errors import ConfigError
from robustbench_x.fitting import Ground, HardenJob, Pool
from robustbench_x.fitting.harden import find_inner
from robustbench_x.hardening import HardeningSpec
from robustbench_x.registry import load_registry
from robustbench_x.testing import HARDENING_CHECKS, ToyVictim, make_view, toy_hardening, toy_victim
from robustbench_x.threat import ThreatModel
from robustbench_x.views import Meter
from robustbench_x_defenses.hardening.embedding import Recipe, embedding_loss, rate_at

REGISTRY = load_registry()
FARE = REGISTRY.hardenings["fare"]
THREAT = ThreatModel(eps=8 / 255)
QUICK: dict[str, dict[str, Any]] = {
    "fare": {"steps": 4, "batch": 6, "inner": "embed?loss=l2&steps=2"},
    "tecoa": {"steps": 4, "batch": 6, "classes": 4, "inner": "embed?loss=l2&steps=2"},
    "dta_training": {"steps": 4, "batch": 6, "inner": "dta?steps=2&search_images=8&search_steps=1"},
    "pruning": {"amount": 0.4},
}


@pytest.mark.parametrize("check", HARDENING_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", list(REGISTRY.hardenings))
def test_every_hardening_keeps_the_contract(name: str, check: Callable[[HardeningSpec, dict[str, Any]], None]) -> None:
    check(REGISTRY.hardenings[name], QUICK[name])


def test_the_loss_is_the_one_worked_by_hand() -> None:
    student = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, -1.0, 0.5], [1.0, 1.0, 4.0]], dtype=torch.float64)
    loss = embedding_loss(student, teacher)
    assert loss.item() == (1 + 1 + 0 + 1 + 4 + 9) / 2
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.tolist() == [[1.0, -1.0, 0.0], [-1.0, 2.0, -3.0]]


def test_the_rate_rises_and_falls_as_published() -> None:
    recipe = Recipe(steps=100, rate=2.0, warmup=0.1)
    rates = [rate_at(number, recipe) for number in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 - math.cos(math.pi / 90))
    assert rate_at(0, Recipe(steps=1, rate=2.0, warmup=0.0)) == 2.0
    assert rate_at(2, Recipe(steps=3, rate=2.0, warmup=1.0)) == 2.0


class _Line(nn.Module):
    """One feature: a weighted sum of the pixels."""

    layers: tuple[str, ...] = ()

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def pooled(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight[:, None]

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        return []


def test_one_step_on_a_linear_encoder_is_the_one_worked_by_hand() -> None:
    weight = torch.randn(48, generator=torch.Generator().manual_seed(3))
    encoder = Encoder(source="line", backbone=_Line(weight.clone()), preprocessing=Preprocessing(input_size=(4, 4)))
    levels = torch.randint(60, 200, (1, 3, 4, 4), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    threat, rate, decay = ThreatModel(eps=0.1), 1e-2, 0.5
    params = {"steps": 1, "batch": 1, "rate": rate, "decay": decay, "warmup": 0.0, "inner": "embed?loss=l2&steps=5"}
    hardening = FARE.build(params)
    pool = Pool(source="one", levels=levels, sha256="one")
    ground = Ground(public=encoder, pool=pool, threat=threat, seed=0, device=torch.device("cpu"))
    job = HardenJob(spec=FARE, hardening=hardening, inner=find_inner(REGISTRY, hardening, threat), ground=ground)
    made = job.run(None)
    # The square of w.d is largest at either corner d = +-eps sign(w); which one, the random start decides.
    w, clean = weight.double(), levels.double().flatten() / 255
    reach = threat.eps * float(w.abs().sum())
    assert made.provenance.losses["adv"] == pytest.approx(reach**2, rel=1e-5)
    side = float(((job.view(Meter()).examples(levels.float() / 255, 0).double().flatten() - clean) @ w).sign())
    gradient = 2 * side * reach * (clean + side * threat.eps * w.sign())
    expected = w * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)  # AdamW's first step
    assert torch.allclose(made.tensors["weight"].double(), expected, atol=1e-6)


def _with(tensors: dict[str, Tensor]) -> ToyVictim:
    victim = toy_victim()
    backbone = copy.deepcopy(victim.encoder.backbone)
    backbone.load_state_dict(tensors)
    encoder = Encoder(source="hardened", backbone=backbone, preprocessing=victim.encoder.preprocessing)
    return ToyVictim(encoder=encoder, head=victim.head, images=victim.images, labels=victim.labels)


def _turned(victim: ToyVictim) -> float:
    """How far an attack that no training saw turns the features of images that no training saw."""
    view = make_view("encoder", victim, THREAT, seed=99, exhaustive=True)
    images = THREAT.project(REGISTRY.attacks["embed"].build({"steps": 10}).run(view), victim.images)
    with torch.no_grad():
        return float(1 - F.cosine_similarity(victim.encoder(images), victim.encoder(victim.images)).mean())


def test_hardening_lowers_what_an_independent_attack_can_do_and_mere_training_does_not() -> None:
    params = {"steps": 30, "batch": 12, "rate": 5e-3, "inner": "embed?loss=l2&steps=3"}
    base = toy_victim()
    hardened = _with(toy_hardening(FARE, params, base, THREAT).run(None).tensors)
    control = _with(toy_hardening(FARE, params, base, ThreatModel(eps=0.0)).run(None).tensors)
    before = _turned(base)
    assert _turned(hardened) < 0.6 * before
    assert _turned(control) > 0.9 * before
    with torch.no_grad():
        kept = F.cosine_similarity(hardened.encoder(base.images), base.encoder(base.images)).mean()
    assert float(kept) > 0.995


def test_batch_norm_keeps_the_original_s_statistics() -> None:
    victim = toy_victim()
    made = toy_hardening(FARE, QUICK["fare"], victim).run(None).tensors
    statistics = dict(victim.encoder.backbone.named_buffers())
    assert len(statistics) == 6
    assert all(torch.equal(made[name], kept) for name, kept in statistics.items())
    assert not torch.equal(made["early.1.weight"], victim.encoder.backbone.state_dict()["early.1.weight"])


def test_the_clean_term_keeps_clean_embeddings_closer() -> None:
    victim, drift = toy_victim(), {}
    for weight in (0.0, 20.0):
        params = {"steps": 20, "batch": 12, "rate": 2e-2, "clean": weight, "inner": "noise"}
        made = toy_hardening(FARE, params, victim, ThreatModel(eps=64 / 255)).run(None)
        assert ("clean" in made.provenance.losses) == (weight > 0)
        with torch.no_grad():
            drift[weight] = float(
                embedding_loss(_with(made.tensors).encoder(victim.images), victim.encoder(victim.images))
            )
    assert drift[20.0] < 0.8 * drift[0.0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"steps": 0}, "steps and batch must be at least 1"),
        ({"rate": 0.0}, r"rate=0\.0 must be positive"),
        ({"warmup": 1.5}, r"warmup=1\.5 must lie between 0 and 1"),
        ({"decay": -1.0}, "decay and clean must not be negative"),
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, Any], message: str) -> None:
    for name in ("fare", "tecoa", "dta_training"):
        with pytest.raises(ConfigError, match=f"{name}: {message}"):
            REGISTRY.hardenings[name].build(params)
