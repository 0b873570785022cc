"""Projections, distances, noise and 8-bit rounding against slow references and properties."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustbench_x.errors import ConfigError
from robustbench_x.randomness import SampleRandom
from robustbench_x.threat import Norm, Placement, ThreatModel, patch_mask

NORMS: tuple[Norm, ...] = ("linf", "l2", "patch")
EPS = {"linf": 8 / 255, "l2": 0.7, "patch": 0.1}


def _images(seed: int, n: int = 3, side: int = 6) -> Tensor:
    levels = torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return levels / 255


def _far(seed: int, inputs: Tensor) -> Tensor:
    return inputs + 2 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed))


def test_linf_projection_is_the_nearest_point_of_ball_and_box() -> None:
    inputs = _images(0)
    candidates, eps = _far(1, inputs), 8 / 255
    got = ThreatModel(eps=eps).project(candidates, inputs)
    for index in np.ndindex(*inputs.shape):
        x, c = float(inputs[index]), float(candidates[index])
        nearest = min(max(c, max(x - eps, 0.0)), min(x + eps, 1.0))
        assert float(got[index]) == pytest.approx(nearest, abs=1e-6)


def test_l2_projection_on_the_ball_is_the_nearest_point() -> None:
    inputs = 0.5 + 0 * _images(0, n=2, side=2)
    candidates = inputs + 0.4 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2))
    got = ThreatModel(norm="l2", eps=0.3).project(candidates, inputs)
    for x, c, g in zip(inputs, candidates, got, strict=True):
        centre, target = x.double().flatten().numpy(), c.double().flatten().numpy()
        solved = scipy.optimize.minimize(
            lambda p, t=target: float(((p - t) ** 2).sum()),
            centre,
            jac=lambda p, t=target: 2 * (p - t),
            constraints={"type": "ineq", "fun": lambda p, m=centre: 0.09 - ((p - m) ** 2).sum()},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        np.testing.assert_allclose(g.flatten().numpy(), solved.x, atol=1e-4)


def test_patch_projection_keeps_every_pixel_outside_the_square() -> None:
    inputs = _images(3, side=20)
    threat = ThreatModel(norm="patch", eps=0.09, placement="top-right")
    got = threat.project(_far(4, inputs), inputs)
    side = int(math.sqrt(0.09 * 400))
    changed = (got != inputs).any(dim=1).any(dim=0)
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[:side, 20 - side :] = True
    assert torch.equal(changed & ~expected, torch.zeros_like(expected))
    assert torch.equal(got[:, :, :side, 20 - side :], _far(4, inputs)[:, :, :side, 20 - side :].clamp(0, 1))


@pytest.mark.parametrize(
    ("placement", "top", "left"),
    [("top-left", 0, 0), ("top-right", 0, 15), ("bottom-left", 15, 0), ("bottom-right", 15, 15), ("center", 7, 7)],
)
def test_patch_sits_where_it_is_placed(placement: str, top: int, left: int) -> None:
    mask = ThreatModel(norm="patch", eps=0.0625, placement=placement).mask(_images(0, side=20))[0, 0]  # type: ignore[arg-type]
    rows, columns = torch.nonzero(mask, as_tuple=True)
    assert (int(rows.min()), int(columns.min())) == (top, left)
    assert int(mask.sum()) == 25


RANDOM = ThreatModel(norm="patch", eps=0.0625, placement="random")
"""A square of 5 x 5 on 20 x 20 pixels, in any of 16 x 16 places."""


@pytest.mark.parametrize(("height", "width"), [(20, 20), (9, 31), (31, 9)])
@pytest.mark.parametrize("eps", [0.0, 0.003, 0.0625, 0.5, 1.0])
def test_a_random_place_lies_inside_the_image(eps: float, height: int, width: int) -> None:
    images = torch.randint(0, 256, (40, 3, height, width), generator=torch.Generator().manual_seed(0)) / 255
    threat = ThreatModel(norm="patch", eps=eps, placement="random")
    side = min(math.isqrt(int(eps * height * width)), height, width)
    corners = threat.corners(images)
    assert (corners.shape, corners.dtype) == ((40, 2), torch.int64)
    assert corners.min() >= 0
    assert (corners.amax(dim=0) <= torch.tensor([height - side, width - side])).all()
    mask = threat.mask(images)
    assert (mask.shape, mask.dtype) == ((40, 1, height, width), torch.bool)
    assert (mask.sum(dim=(1, 2, 3)) == side * side).all()


def test_a_random_place_depends_on_its_image_alone() -> None:
    images = _images(0, n=30, side=20)
    together = RANDOM.corners(images)
    assert torch.equal(together, torch.cat([RANDOM.corners(image[None]) for image in images]))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(RANDOM.corners(images[order]), together[order])
    assert torch.equal(RANDOM.corners(images[[3, 3]]), together[[3, 3]])
    torch.manual_seed(5)
    assert torch.equal(RANDOM.corners(images), together)
    assert torch.equal(RANDOM.mask(images)[order], RANDOM.mask(images[order]))


def test_a_random_place_survives_float_rounding_and_memory_layout() -> None:
    """Attack and judge may hold the same pixels in another layout, or after a round trip through 8 bits."""
    images = _images(2, n=30, side=20)
    expected = RANDOM.corners(images)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(3)) - 0.5
    assert torch.equal(RANDOM.corners(images + 1e-3 * noise), expected)
    assert torch.equal(RANDOM.corners((images.double() * 255).round().div(255).float()), expected)
    assert torch.equal(RANDOM.corners(images.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(RANDOM.corners(images.clone().requires_grad_()), expected)


def test_random_places_are_spread_over_the_image() -> None:
    threat = ThreatModel(norm="patch", eps=1 / 9, placement="random")
    corners = threat.corners(_images(3, n=2500))  # 2 x 2 on 6 x 6 pixels: 25 places
    counts = torch.bincount(corners[:, 0] * 5 + corners[:, 1], minlength=25)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_images_that_differ_in_one_level_have_places_of_their_own() -> None:
    base = torch.full((200, 3, 20, 20), 0.5)
    for number in range(200):
        base[number, number % 3, number // 20, number % 20] += 4 / 255
    places = {tuple(corner) for corner in RANDOM.corners(base).tolist()}
    assert len(places) > 100  # 256 places: 200 uniform draws meet some 139


def test_no_other_norm_has_a_place() -> None:
    images = _images(4)
    for norm in ("linf", "l2"):
        assert ThreatModel(norm=norm, eps=0.1, placement="random").mask(images).all()


@pytest.mark.parametrize("placement", ["random", "center", "bottom-left"])
def test_nothing_outside_the_square_changes_by_a_bit(placement: Placement) -> None:
    # Off the 8-bit grid, so that rounding outside the square would show.
    inputs = torch.rand(12, 3, 20, 20, generator=torch.Generator().manual_seed(6))
    threat = ThreatModel(norm="patch", eps=0.0625, placement=placement)
    candidates, random = _far(7, inputs), SampleRandom(range(12))
    projected = threat.project(candidates, inputs)
    views = {
        "project": projected,
        "quantize": threat.quantize(projected, inputs),
        "noise": threat.noise(inputs, random),
        "start": threat.start(inputs, random),
        "start of some": threat.start(inputs[:4], random, torch.arange(4)),
    }
    for name, images in views.items():
        clean = inputs[: len(images)]
        inside = threat.mask(clean).expand_as(clean)
        assert torch.equal(images[~inside], clean[~inside]), name
        assert (images != clean).any(dim=1)[inside[:, 0]].all(), f"{name} leaves no pixel of the square alone"
        assert 0 <= images.min() <= images.max() <= 1, name
        np.testing.assert_allclose(threat.distance(images, clean).numpy(), 25 / 400, rtol=1e-5, err_msg=name)
        assert torch.equal(threat.project(images, clean), images), name
        assert (threat.overrun(images, clean) == 0).all(), name
    mask = threat.mask(inputs).expand_as(inputs)
    assert torch.equal(projected[mask], candidates.clamp(0, 1)[mask])
    levels = views["quantize"][mask] * 255
    assert (levels - levels.round()).abs().max() < 1e-3


@pytest.mark.parametrize(("side", "height", "width"), [(0, 4, 5), (1, 4, 5), (3, 7, 5), (5, 7, 5)])
def test_patch_mask_equals_the_loop(side: int, height: int, width: int) -> None:
    places = [(top, left) for top in range(height - side + 1) for left in range(width - side + 1)]
    mask = patch_mask(torch.tensor(places), side, height, width)
    assert (mask.shape, mask.dtype) == ((len(places), 1, height, width), torch.bool)
    for (top, left), found in zip(places, mask[:, 0].tolist(), strict=True):
        for row in range(height):
            for column in range(width):
                expected = row in range(top, top + side) and column in range(left, left + side)
                assert found[row][column] == expected


@settings(max_examples=60, deadline=None)
@given(
    norm=st.sampled_from(NORMS), eps=st.floats(0, 1), seed=st.integers(0, 10_000), scale=st.sampled_from([0.01, 1, 1e4])
)
def test_projection_lands_inside_stays_there_and_is_finite(norm: Norm, eps: float, seed: int, scale: float) -> None:
    inputs, threat = _images(seed), ThreatModel(norm=norm, eps=eps)
    candidates = inputs + scale * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed))
    once = threat.project(candidates, inputs)
    assert once.isfinite().all()
    assert once.min() >= 0
    assert once.max() <= 1
    assert (threat.distance(once, inputs) <= eps * (1 + 1e-5) + 1e-6).all()
    assert (threat.project(once, inputs) - once).abs().max() < 1e-6
    assert (threat.overrun(once, inputs) < 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(norm=st.sampled_from(NORMS), eps=st.floats(0, 0.3), seed=st.integers(0, 10_000))
def test_rounding_is_8_bit_and_inside_the_budget(norm: Norm, eps: float, seed: int) -> None:
    inputs, threat = _images(seed), ThreatModel(norm=norm, eps=eps)
    candidates = threat.project(_far(seed, inputs), inputs)
    rounded = threat.quantize(candidates, inputs)
    assert ((rounded * 255) - (rounded * 255).round()).abs().max() < 1e-3
    assert (threat.distance(rounded, inputs) <= eps + 1e-5).all()


def test_rounding_moves_a_pixel_by_at_most_one_level() -> None:
    inputs, threat = _images(5), ThreatModel(eps=7.6 / 255)
    candidates = threat.project(_far(6, inputs), inputs)
    assert ((threat.quantize(candidates, inputs) - candidates).abs() <= 1 / 255 + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_distances_agree_with_numpy(norm: Norm) -> None:
    inputs = _images(7, side=8)
    candidates = ThreatModel(norm=norm, eps=EPS[norm]).project(_far(8, inputs), inputs)
    change = (candidates - inputs).double().numpy()
    reference = {
        "linf": [np.abs(c).max() for c in change],
        "l2": [np.sqrt((c**2).sum()) for c in change],
        "patch": [(c != 0).any(axis=0).mean() for c in change],
    }
    got = ThreatModel(norm=norm, eps=EPS[norm]).distance(candidates, inputs)
    np.testing.assert_allclose(got.numpy(), reference[norm], atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_noise_spends_the_whole_budget_and_repeats(norm: Norm) -> None:
    inputs = 0.5 + 0 * _images(0, n=4, side=20)
    threat = ThreatModel(norm=norm, eps=EPS[norm])
    noise = threat.noise(inputs, SampleRandom([1, 2, 3, 4]))
    assert torch.equal(noise, threat.noise(inputs, SampleRandom([1, 2, 3, 4])))
    used = threat.distance(noise, inputs)
    reach = EPS[norm] if norm != "patch" else (math.isqrt(40) ** 2) / 400
    np.testing.assert_allclose(used.numpy(), reach, rtol=1e-3)


def test_a_sample_draws_the_same_alone_and_in_a_batch() -> None:
    inputs, threat = _images(9, n=3), ThreatModel(norm="l2", eps=0.5)
    together = threat.start(inputs, SampleRandom([10, 11, 12]))
    alone = threat.start(inputs[1:2], SampleRandom([11]))
    assert torch.equal(together[1:2], alone)
    picked = threat.start(inputs[[2]], SampleRandom([10, 11, 12]), torch.tensor([2]))
    assert torch.equal(together[2:], picked)


def test_l2_ascent_survives_tiny_and_zero_gradients() -> None:
    gradient = torch.zeros(2, 3, 2, 2)
    gradient[0, 0, 0, 0] = 1e-30
    step = ThreatModel(norm="l2", eps=1.0).ascent(gradient)
    assert float(step[0].norm()) == pytest.approx(1.0)
    assert float(step[1].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("linf", 8.0, "exceeds 1"),
        ("patch", 1.5, "exceeds 1"),
        ("linf", -0.1, ">= 0"),
        ("l2", math.nan, "finite"),
        ("l1", 0.1, "unknown norm"),
    ],
)
def test_an_impossible_budget_is_refused(norm: Norm, eps: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ThreatModel(norm=norm, eps=eps)


def test_an_unknown_placement_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown patch placement 'anywhere'; choose from .*center, random"):
        ThreatModel(norm="patch", eps=0.1, placement="anywhere")  # type: ignore[arg-type]
