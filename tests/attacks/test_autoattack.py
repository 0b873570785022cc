"""FAB against known optima, its projection against scipy, Square's schedule and caps, the suite against its parts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog, minimize
from torch import Tensor

from robustbench_x.errors import ConfigError
from robustbench_x.plugin import AttackSpec
from robustbench_x.randomness import SampleRandom, derive_seed
from robustbench_x.testing import ToyVictim, linear_victim, make_view, toy_victim
from robustbench_x.threat import Norm, ThreatModel
from robustbench_x.views import Meter, ModelHandle, Query, QueryView, View, WhiteboxView
from robustbench_x_attacks import gradient, torchattacks_bridge
from robustbench_x_attacks.autoattack import specs
from robustbench_x_attacks.autoattack.fab import likeliest_wrong
from robustbench_x_attacks.autoattack.projection import to_hyperplane
from robustbench_x_attacks.autoattack.square import share

SPECS: dict[str, AttackSpec] = {s.name: s for s in (*gradient.SPECS, *specs(), *torchattacks_bridge.specs())}
NORMS: tuple[Literal["linf", "l2"], ...] = ("linf", "l2")
BLACK_BOX = ("square", "random_search")
Logits = Callable[[Tensor], Tensor]


def _view(
    name: str,
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    meter: Meter,
    *,
    classes: int,
    cap: int | None = None,
    exhaustive: bool = False,
    stochastic: bool = False,
) -> View:
    """The view that the attack called `name` gets of any function."""
    shared: dict[str, Any] = {
        "inputs": images.clone(),
        "threat": threat,
        "random": SampleRandom([derive_seed(0, i) for i in range(len(images))]),
        "exhaustive": exhaustive,
        "labels": labels.clone(),
        "num_classes": classes,
    }
    if SPECS[name].access == "whitebox":
        return WhiteboxView(**shared, model=ModelHandle(logits, meter, stochastic=stochastic))
    return QueryView(**shared, query=Query(logits, meter, answer="scores", cap=cap, stochastic=stochastic))


def _attack(
    name: str, victim: ToyVictim, threat: ThreatModel, *, exhaustive: bool = False, seed: int = 0, **params: Any
) -> Tensor:
    spec = SPECS[name]
    images: Tensor = spec.build(params).run(make_view(spec.access, victim, threat, exhaustive=exhaustive, seed=seed))
    return images


@torch.no_grad()
def _fooled(victim: ToyVictim, images: Tensor, threat: ThreatModel) -> Tensor:
    wrong: Tensor = victim.logits(threat.project(images, victim.images)).argmax(dim=1) != victim.labels
    return wrong


def _first(victim: ToyVictim, count: int) -> ToyVictim:
    return replace(victim, images=victim.images[:count], labels=victim.labels[:count])


@pytest.fixture(scope="module")
def trained() -> ToyVictim:
    """The toy network with every weight trained for 60 steps."""
    victim = toy_victim(num_images=30)
    weights = [*victim.encoder.parameters(), *victim.head.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(victim.logits(victim.images), victim.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    with torch.no_grad():
        assert (victim.logits(victim.images).argmax(dim=1) == victim.labels).all()
    return victim


def _exact(point: np.ndarray, normal: np.ndarray, gap: float, norm: str) -> float:
    """The least norm of a change d inside the box with normal . d = gap, by scipy."""
    low, high, size = -point, 1 - point, len(point)
    if norm == "linf":
        identity, ones = np.eye(size), np.ones((size, 1))
        found = linprog(
            np.append(np.zeros(size), 1.0),
            A_ub=np.block([[identity, -ones], [-identity, -ones]]),
            b_ub=np.zeros(2 * size),
            A_eq=np.append(normal, 0.0)[None],
            b_eq=[gap],
            bounds=[*zip(low, high, strict=True), (0, None)],
        )
        assert found.success
        return float(found.fun)
    found = minimize(
        lambda d: d @ d,
        np.zeros(size),
        jac=lambda d: 2 * d,
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "eq", "fun": lambda d: normal @ d - gap, "jac": lambda d: normal},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert found.success
    return float(np.sqrt(found.fun))


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_agrees_with_scipy(norm: Literal["linf", "l2"]) -> None:
    generator = torch.Generator().manual_seed(3)
    points = (1.6 * torch.rand(12, 14, generator=generator) - 0.3).clamp(0, 1)
    normals = torch.randn(12, 14, generator=generator)
    normals[:, 3] = 0
    up = (normals.clamp(min=0) * (1 - points) - normals.clamp(max=0) * points).sum(dim=1)
    down = (normals.clamp(min=0) * points - normals.clamp(max=0) * (1 - points)).sum(dim=1)
    reach = torch.linspace(0.05, 0.97, 12)
    gaps = torch.where(torch.arange(12) % 2 == 0, reach * up, -reach * down)
    change = to_hyperplane(points, normals, gaps, norm)
    assert ((points + change >= -1e-6) & (points + change <= 1 + 1e-6)).all()
    assert torch.allclose((normals * change).sum(dim=1), gaps, atol=1e-5)
    size = change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)
    for i in range(12):
        best = _exact(points[i].double().numpy(), normals[i].double().numpy(), float(gaps[i]), norm)
        assert float(size[i]) == pytest.approx(best, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_where_there_is_nothing_to_reach(norm: Literal["linf", "l2"]) -> None:
    points, normals = torch.tensor([[0.25, 0.5, 1.0]]), torch.tensor([[1.0, -2.0, 1.0]])
    beyond = to_hyperplane(points, normals, torch.tensor([9.0]), norm)
    assert torch.equal(points + beyond, torch.tensor([[1.0, 0.0, 1.0]]))
    assert not to_hyperplane(points, torch.zeros(1, 3), torch.tensor([1.0]), norm).any()
    assert not to_hyperplane(points, normals, torch.tensor([0.0]), norm).any()
    plain = to_hyperplane(points, normals, torch.tensor([0.3]), norm)
    for scale in (1e-25, 1e25):
        assert torch.allclose(to_hyperplane(points, scale * normals, torch.tensor([0.3 * scale]), norm), plain)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_the_smallest_change_of_a_linear_model(norm: Norm) -> None:
    victim, weight = linear_victim()
    with torch.no_grad():
        logits = victim.logits(victim.images)
    optimum = (logits[:, 1] - logits[:, 0]).abs() / (weight.abs().sum() if norm == "linf" else weight.norm())
    threat = ThreatModel(norm=norm, eps=0.001)
    images = _attack("fab_t", victim, threat, exhaustive=True, steps=40)
    distance = threat.distance(images, victim.images)
    assert (distance >= optimum * (1 - 1e-4)).all()
    assert (distance <= optimum * 1.01).all()


@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_the_smallest_change_where_the_box_is_in_the_way(norm: Norm) -> None:
    generator = torch.Generator().manual_seed(4)
    shape = (4, 3, 3, 3)
    images = (2.4 * torch.rand(shape, generator=generator) - 0.7).clamp(0, 1)
    weight = torch.randn(27, generator=generator)
    scores = images.flatten(1) @ weight
    up = (weight.clamp(min=0) * (1 - images.flatten(1)) - weight.clamp(max=0) * images.flatten(1)).sum(dim=1)
    gaps = 0.8 * up
    bias = -(scores + gaps)

    def run(i: int) -> tuple[Tensor, float]:
        def logits(pixels: Tensor) -> Tensor:
            score = pixels.flatten(1) @ weight + bias[i]
            return torch.stack([torch.zeros_like(score), score], dim=1)

        threat = ThreatModel(norm=norm, eps=1e-3)
        one, label = images[i : i + 1], torch.zeros(1, dtype=torch.long)
        view = _view("fab_t", logits, one, label, threat, Meter(), classes=2, exhaustive=True)
        found: Tensor = SPECS["fab_t"].build({"steps": 60}).run(view)
        assert logits(found).argmax() == 1
        return threat.distance(found, one), _exact(one.flatten().double().numpy(), weight.numpy(), float(gaps[i]), norm)

    for i in range(4):
        distance, best = run(i)
        assert best * (1 - 1e-3) <= float(distance) <= 1.02 * best


def test_the_published_schedule_of_square() -> None:
    marks = [
        (0, 1),
        (10, 1),
        (11, 2),
        (50, 2),
        (51, 4),
        (200, 4),
        (201, 8),
        (500, 8),
        (501, 16),
        (1000, 16),
        (1001, 32),
    ]
    marks += [(2000, 32), (2001, 64), (4001, 128), (6001, 256), (8000, 256), (8001, 512), (9999, 512)]
    assert [(i, 0.8 / share(i, 10000)) for i, _ in marks] == marks
    assert [share(i, 5000) for i in range(5000)] == [share(2 * i, 10000) for i in range(5000)]


def _recorded(logits: Logits) -> tuple[Logits, list[Tensor]]:
    asked: list[Tensor] = []

    def recording(images: Tensor) -> Tensor:
        asked.append(images.detach().clone())
        return logits(images)

    return recording, asked


def _linear(shape: tuple[int, int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Logits, Tensor]:
    """Images, labels (all 0), a linear two-class model of theirs, and the least linf change that fools each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(shape, generator=generator)
    weight = torch.randn(images[0].numel(), generator=generator)
    bias = -(images.flatten(1) @ weight).amax() - 1

    def logits(pixels: Tensor) -> Tensor:
        score = pixels.flatten(1) @ weight + bias
        return torch.stack([torch.zeros_like(score), score], dim=1)

    return images, torch.zeros(shape[0], dtype=torch.long), logits, -logits(images)[:, 1] / weight.abs().sum()


@pytest.mark.parametrize(("name", "norm"), [*((n, m) for n in BLACK_BOX for m in NORMS), ("random_search", "patch")])
@pytest.mark.parametrize("size", [(16, 16), (9, 14), (4, 3)])
def test_every_candidate_lies_inside_the_budget(name: str, norm: Norm, size: tuple[int, int]) -> None:
    images, labels, logits, _ = _linear((2, 3, *size))
    threat = ThreatModel(norm=norm, eps={"linf": 0.05, "l2": 0.4, "patch": 0.1}[norm])
    recording, asked = _recorded(logits)
    view = _view(name, recording, images, labels, threat, Meter(), classes=2, exhaustive=True)
    result = SPECS[name].build({"queries": 60}).run(view)
    assert len(asked) == 60
    for candidates in (*asked, result):
        assert (candidates >= 0).all()
        assert (candidates <= 1).all()
        assert threat.overrun(candidates, images).max() <= 1e-6
    if norm == "l2":
        assert (threat.distance(asked[0], images) > 0.5 * threat.eps).all()


def test_square_climbs_a_linear_model_to_its_corner() -> None:
    images, labels, logits, least = _linear((3, 3, 6, 6))
    threat = ThreatModel(eps=1.5 * float(least.amax()))
    view = _view("square", logits, images, labels, threat, Meter(), classes=2)
    result = SPECS["square"].build({"queries": 600}).run(view)
    assert (logits(result).argmax(dim=1) == 1).all()


def test_square_never_asks_about_the_image_it_has() -> None:
    images, labels, logits, _ = _linear((1, 3, 4, 4))
    recording, asked = _recorded(lambda pixels: logits(pixels) * 0)
    threat = ThreatModel(eps=0.001)
    view = _view("square", recording, images.mul(0.5).add(0.25), labels, threat, Meter(), classes=2)
    SPECS["square"].build({"queries": 200}).run(view)
    assert not any(torch.equal(candidate, asked[0]) for candidate in asked[1:])


def _constant(classes: int = 5) -> Logits:
    """Always class 0, with a gradient of zero."""
    row = torch.tensor([3.0, *[0.1 * k for k in range(classes - 1)]])
    return lambda images: row + 0 * images.flatten(1).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("name", BLACK_BOX)
@pytest.mark.parametrize(("cap", "each"), [(None, 7), (4 * 7, 7), (4 * 7 - 1, 6), (4 * 3 + 2, 3), (3, 0)])
def test_queries_and_caps_are_exact(name: str, cap: int | None, each: int) -> None:
    meter, threat = Meter(), ThreatModel(eps=0.1)
    images, labels = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    view = _view(name, _constant(), images, labels, threat, meter, classes=5, cap=cap)
    result = SPECS[name].build({"queries": 7}).run(view)
    assert (meter.forwards, meter.backwards) == (4 * each, 0)
    assert threat.overrun(result, images).max() <= 1e-6


@pytest.mark.parametrize("name", BLACK_BOX)
def test_a_sample_fooled_by_queries_is_asked_about_no_more(name: str) -> None:
    meter = Meter()
    view = _view(
        name, _constant(), torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 2]), ThreatModel(eps=0.1), meter, classes=5
    )
    SPECS[name].build({"queries": 9}).run(view)
    assert meter.forwards == 2 * 1 + 2 * 9


@pytest.mark.parametrize("exhaustive", [False, True])
def test_what_the_suite_spends_on_a_sample_that_resists_and_on_one_that_does_not(exhaustive: bool) -> None:
    steps, targets, queries, meter = 6, 3, 11, Meter()
    labels = torch.tensor([0, 1, 0, 2])
    view = _view(
        "autoattack",
        _constant(),
        torch.rand(4, 3, 8, 8),
        labels,
        ThreatModel(eps=0.1),
        meter,
        classes=5,
        exhaustive=exhaustive,
    )
    SPECS["autoattack"].build({"steps": steps, "targets": targets, "queries": queries}).run(view)
    apgd, fab = (1 + targets) * (steps + 1), targets * steps
    hard, easy = 2, 2
    climbing = 4 if exhaustive else hard
    assert meter.backwards == climbing * apgd + hard * fab
    assert meter.forwards == (hard + easy) + climbing * apgd + hard * (2 * fab + queries)


def test_fab_spends_two_forwards_and_a_gradient_a_step() -> None:
    meter = Meter()
    view = _view(
        "fab_t", _constant(), torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 0]), ThreatModel(eps=0.1), meter, classes=5
    )
    SPECS["fab_t"].build({"steps": 5, "targets": 9}).run(view)
    assert (meter.forwards, meter.backwards) == (3 + 2 * 4 * 5 * 2, 2 * 4 * 5)


def test_a_change_beyond_the_budget_is_no_success() -> None:
    """FAB goes on where the nearest misclassified image lies outside the budget, and still returns it."""
    victim, weight = linear_victim()
    spent = {}
    for factor in (0.5, 1.2):
        with torch.no_grad():
            logits = victim.logits(victim.images)
        least = float(((logits[:, 1] - logits[:, 0]).abs() / weight.abs().sum()).amin())
        threat, meter = ThreatModel(eps=factor * least), Meter()
        view = make_view("whitebox", victim, threat, meter=meter)
        images = SPECS["fab_t"].build({"steps": 20}).run(view)
        spent[factor] = meter.backwards
        with torch.no_grad():
            assert (victim.logits(images).argmax(dim=1) != victim.labels).all()
    assert spent[0.5] == 20 * len(victim.images) > spent[1.2]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("fab_t", {"steps": 10}),
        ("square", {"queries": 60}),
        ("random_search", {"queries": 20}),
        ("autoattack", {"steps": 5, "queries": 15}),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
def test_the_images_of_a_sample_hang_on_no_other(name: str, params: dict[str, Any], norm: Norm) -> None:
    victim = toy_victim(num_images=9)
    threat = ThreatModel(norm=norm, eps=3 / 255 if norm == "linf" else 0.15)
    together = _attack(name, victim, threat, **params)
    assert torch.equal(together, _attack(name, victim, threat, **params))
    for count in (1, 4):
        apart = _attack(name, _first(victim, count), threat, **params)
        # The victim's convolutions round differently in another batch.
        assert torch.allclose(together[:count], apart, atol=1e-4)


def test_random_search_keeps_the_worst_draw() -> None:
    images, labels, logits, _ = _linear((2, 3, 8, 8))
    recording, asked = _recorded(logits)
    view = _view("random_search", recording, images, labels, ThreatModel(eps=0.01), Meter(), classes=2)
    result = SPECS["random_search"].build({"queries": 24}).run(view)
    worst = torch.stack([logits(candidates)[:, 1] for candidates in asked]).amax(dim=0)
    assert torch.equal(logits(result)[:, 1], worst)
    assert SPECS["random_search"].control


def test_random_search_is_weaker_than_square_and_square_than_the_suite(trained: ToyVictim) -> None:
    threat = ThreatModel(eps=12 / 255)
    several: dict[str, dict[str, Any]] = {
        "random_search": {"queries": 100},
        "square": {"queries": 100},
        "autoattack": {"steps": 10, "queries": 20},
    }
    fooled = {
        name: int(_fooled(trained, _attack(name, trained, threat, **params), threat).sum())
        for name, params in several.items()
    }
    assert fooled["random_search"] <= fooled["square"] <= fooled["autoattack"]
    assert fooled["square"] > 0


@pytest.mark.parametrize(("norm", "eps"), [("linf", 3 / 255), ("l2", 0.2)])
def test_the_suite_fools_what_any_part_does(trained: ToyVictim, norm: Norm, eps: float) -> None:
    victim, threat = _first(trained, 15), ThreatModel(norm=norm, eps=eps)
    suite = _fooled(victim, _attack("autoattack", victim, threat, steps=20, queries=30), threat)
    assert 0 < int(suite.sum()) < len(suite), "a budget at which some resist"
    parts: dict[str, dict[str, Any]] = {
        "apgd_ce": {"steps": 20},
        "apgd_t": {"steps": 20},
        "fab_t": {"steps": 20},
        "square": {"queries": 30},
    }
    for name, params in parts.items():
        part = _fooled(victim, _attack(name, victim, threat, **params), threat)
        assert int((part & ~suite).sum()) <= 1, f"{name} fools samples that the suite does not"


@pytest.mark.parametrize(("norm", "eps"), [("linf", 3 / 255), ("l2", 0.2)])
def test_the_suite_leaves_no_more_robust_than_torchattacks_for_fewer_gradients(
    trained: ToyVictim, norm: Norm, eps: float
) -> None:
    victim = _first(trained, 15)
    for factor, at_most in ((1.0, 1.0), (8.0, 0.2)):
        threat = ThreatModel(norm=norm, eps=factor * eps)
        fooled, gradients = {}, {}
        for name in ("autoattack", "torchattacks:AutoAttack"):
            meter = Meter()
            view = make_view("whitebox", victim, threat, meter=meter)
            images = SPECS[name].build({"steps": 15, "queries": 20}).run(view)
            fooled[name], gradients[name] = int(_fooled(victim, images, threat).sum()), meter.backwards
        assert fooled["autoattack"] >= fooled["torchattacks:AutoAttack"]
        assert gradients["autoattack"] <= at_most * gradients["torchattacks:AutoAttack"]


@pytest.mark.parametrize(
    ("name", "params", "budgets"),
    [
        ("FAB", {"steps": 15}, {"linf": (2, 3.5), "l2": (0.14, 0.22)}),
        ("Square", {"queries": 250}, {"linf": (8,), "l2": (0.8,)}),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
def test_as_strong_as_torchattacks(
    trained: ToyVictim, name: str, params: dict[str, Any], budgets: dict[str, tuple[float, ...]], norm: Norm
) -> None:
    """Over the budgets, and two seeds where there is chance, the successes add up to nine in ten of theirs at least."""
    victim, seeds = _first(trained, 15), (0, 1) if name == "Square" else (0,)
    successes = {"native": 0, "torchattacks": 0}
    for side, title in (
        ("native", {"FAB": "fab_t", "Square": "square"}[name]),
        ("torchattacks", f"torchattacks:{name}"),
    ):
        for budget in budgets[norm]:
            threat = ThreatModel(norm=norm, eps=budget / 255 if norm == "linf" else budget)
            for seed in seeds:
                images = _attack(title, victim, threat, seed=seed, **params)
                successes[side] += int(_fooled(victim, images, threat).sum())
    assert 0 < successes["torchattacks"] < len(budgets[norm]) * len(seeds) * len(victim.images), (
        "budgets at which some resist"
    )
    assert successes["native"] >= 0.9 * successes["torchattacks"]


def _brief(name: str) -> Any:
    """The attack called `name` at 4 steps and 4 queries."""
    return SPECS[name].build({p.name: 4 for p in SPECS[name].params if p.name in ("steps", "queries")})


def _nan_gradient(images: Tensor) -> Tensor:
    """Finite logits, always class 0, whose gradient is 0 * inf."""
    flat = images.flatten(1)
    return _constant()(images) + (flat - flat.detach()).abs().sqrt().sum(dim=1, keepdim=True)


def _nan_logits(images: Tensor) -> Tensor:
    return _constant()(images) * torch.where(images.flatten(1).std(dim=1, keepdim=True) > 1e-3, torch.nan, 1.0)


@pytest.mark.parametrize(
    ("name", "logits"),
    [("fab_t", _nan_gradient), ("autoattack", _nan_gradient)]
    + [(name, _nan_logits) for name in ("fab_t", "autoattack", *BLACK_BOX)],
)
def test_nan_is_never_robust(name: str, logits: Logits) -> None:
    """The first image resists and the second is wrong from the start: only the first is spoiled."""
    images, threat = torch.full((2, 3, 8, 8), 0.5), ThreatModel(eps=0.1)
    view = _view(name, logits, images, torch.tensor([0, 1]), threat, Meter(), classes=5)
    result = _brief(name).run(view)
    if logits is _nan_logits and name == "fab_t":
        result = _spoiled_by_noise(threat, images)
    assert result[0].isnan().any()
    if name not in BLACK_BOX:
        assert result[1].isfinite().all()


def _spoiled_by_noise(threat: ThreatModel, images: Tensor) -> Tensor:
    """FAB never leaves a flat image, so it is started on one that is not."""
    rough = images.clone()
    rough[0] += 0.1 * torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    view = _view("fab_t", _nan_logits, rough, torch.tensor([0, 1]), threat, Meter(), classes=5)
    result: Tensor = SPECS["fab_t"].build({"steps": 3}).run(view)
    return result


def test_nan_does_not_spoil_what_is_fooled_all_the_same() -> None:
    """A gradient that breaks stops no attack that needs none."""
    images, labels, logits, least = _linear((2, 3, 6, 6))

    def broken(pixels: Tensor) -> Tensor:
        flat = pixels.flatten(1)
        return logits(pixels) + (flat - flat.detach()).abs().sqrt().sum(dim=1, keepdim=True)

    threat = ThreatModel(eps=2 * float(least.amax()))
    view = _view("autoattack", broken, images, labels, threat, Meter(), classes=2)
    result = SPECS["autoattack"].build({"steps": 3, "queries": 400}).run(view)
    assert (logits(result).argmax(dim=1) == 1).all()


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("version", ["standard", "rand"])
def test_few_classes_fall_back(classes: int, version: str) -> None:
    """No DLR below 3 classes, no targeted DLR below 4, and never more targets than there are other classes."""
    victim, meter = toy_victim(num_classes=classes, num_images=6), Meter()
    spec = SPECS["autoattack"].build({"steps": 5, "queries": 5, "version": version})
    images = spec.run(make_view("whitebox", victim, ThreatModel(eps=32 / 255), meter=meter))
    assert _fooled(victim, images, ThreatModel(eps=32 / 255)).all()
    spent = Meter()
    view = make_view("whitebox", victim, ThreatModel(eps=32 / 255), meter=spent, exhaustive=True)
    spec.run(view)
    walks = 2 if version == "rand" else classes
    assert spent.backwards == 6 * 6 * walks


def test_one_class_cannot_be_fooled_and_does_not_crash() -> None:
    images, labels = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    for name in ("autoattack", "fab_t", "square", "random_search"):
        view = _view(name, _constant(1), images, labels, ThreatModel(eps=0.1), Meter(), classes=1)
        assert _brief(name).run(view).shape == images.shape


def test_a_random_victim_gets_the_version_for_it() -> None:
    for version, expected in (("auto", 2 * 5 * 3), ("rand", 2 * 5 * 3), ("standard", (1 + 2) * 5 * 3 + 2 * 4)):
        meter = Meter()
        images, labels = torch.rand(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)
        threat = ThreatModel(eps=0.1)
        view = _view("autoattack", _constant(3), images, labels, threat, meter, classes=3, stochastic=True)
        SPECS["autoattack"].build({"steps": 4, "eot": 3, "queries": 2, "version": version}).run(view)
        assert meter.backwards == expected


@pytest.mark.parametrize(
    ("name", "params"), [("square", {"queries": 4000}), ("random_search", {"queries": 4000}), ("fab_t", {"steps": 20})]
)
def test_a_lucky_draw_of_a_random_victim_is_no_success(name: str, params: dict[str, Any]) -> None:
    """The victim is wrong by chance on one look in forty wherever the image is, and mostly wrong in one corner."""
    images, labels = torch.full((6, 3, 8, 8), 0.5), torch.zeros(6, dtype=torch.long)
    threat, generator = ThreatModel(eps=0.1), torch.Generator().manual_seed(0)
    coarse = torch.where(torch.rand(3, 2, 2, generator=generator) < 0.5, -1.0, 1.0)
    weight = F.interpolate(coarse[None], (8, 8))[0]

    def truth(x: Tensor) -> Tensor:
        return -1.0 + 4.0 * ((x - 0.5) * weight).mean(dim=(1, 2, 3)) / threat.eps

    def logits(x: Tensor) -> Tensor:
        noise = 0.5 * torch.randn(len(x), generator=generator)
        return torch.stack([torch.zeros(len(x)), truth(x) + noise], dim=1)

    view = _view(name, logits, images, labels, threat, Meter(), classes=2, stochastic=True)
    made = threat.project(SPECS[name].build(params).run(view), images)
    assert (truth(made) > 0).float().mean() > 0.8


def test_a_random_victim_costs_no_more_queries_than_allowed() -> None:
    images, labels = torch.full((4, 3, 8, 8), 0.5), torch.zeros(4, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)

    def logits(x: Tensor) -> Tensor:
        return torch.randn(len(x), 3, generator=generator) - torch.tensor([0.0, 9.0, 9.0])

    for name in BLACK_BOX:
        meter = Meter()
        view = _view(name, logits, images, labels, ThreatModel(eps=0.1), meter, classes=3, cap=400, stochastic=True)
        SPECS[name].build({"queries": 5000}).run(view)
        assert 40 < meter.forwards <= 400


def test_targets_are_the_likeliest_wrong_classes() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, torch.nan, 1.0]])
    labels = torch.tensor([0, 0])
    assert likeliest_wrong(logits, labels, 9).tolist() == [[2, 1, 3], [1, 3, 2]]
    assert likeliest_wrong(logits, labels, 2).tolist() == [[2, 1], [1, 3]]


def test_what_resists_returns_its_widest_margin(trained: ToyVictim) -> None:
    threat = ThreatModel(eps=1 / 255)
    images = _attack("autoattack", trained, threat, steps=10, queries=10)
    noisy = threat.noise(trained.images, SampleRandom(range(len(trained.images))))
    resisting = ~_fooled(trained, images, threat)
    with torch.no_grad():
        margins = [
            trained.logits(x).gather(1, trained.labels[:, None])[:, 0]
            - trained.logits(x).scatter(1, trained.labels[:, None], -torch.inf).amax(dim=1)
            for x in (images, noisy)
        ]
    assert resisting.any()
    assert (margins[0] < margins[1])[resisting].all()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("fab_t", {"steps": 0}, "at least 1"),
        ("fab_t", {"beta": 1.0}, "beta between 0 and 1"),
        ("square", {"queries": 0}, "queries=0 must be at least 1"),
        ("square", {"p_init": 0.0}, "p_init=0.0 must lie in"),
        ("random_search", {"queries": 0}, "queries=0 must be at least 1"),
        ("autoattack", {"targets": 0}, "targets=0 must be at least 1"),
        ("autoattack", {"version": "plus"}, "version='plus'"),
    ],
)
def test_wrong_parameters_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SPECS[name].build(params)
