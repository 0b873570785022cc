"""The victim as deployed, and the defence as an attacker may know it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from robustbench_x.errors import RangeError, SampleError
from robustbench_x.plugin import DefenseSpec
from robustbench_x.testing import toy_victim
from robustbench_x.victim import DefendedEncoder, Shield, fresh_draw, perceive

TOY = toy_victim()


class Halves:
    """A defence in closed form: half of the image; its stand-in is a third of it."""

    def apply(self, images: Tensor) -> Tensor:
        return images * 0.5

    def stand_in(self, images: Tensor) -> Tensor:
        return images / 3


class Shrinks:
    """Half the size."""

    def apply(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 2)


def _shield(defense: Any, **spec: Any) -> Shield:
    made = DefenseSpec(name="planted", summary="s", factory=type(defense), source="s", **spec)
    return Shield(spec=made, defense=defense)


def _seen(shield: Shield | None, knowledge: Any) -> tuple[Tensor, Tensor]:
    """Value, and gradient of the sum."""
    images = TOY.images.clone().requires_grad_(True)
    value = perceive(shield, knowledge)(images)
    (gradient,) = torch.autograd.grad(value.sum(), images)
    return value.detach(), gradient


@pytest.mark.parametrize(
    ("knowledge", "gradient", "value", "slope"),
    [
        ("none", "exact", 1.0, 1.0),
        ("oblivious", "exact", 1.0, 1.0),
        ("bpda", "exact", 0.5, 1.0),
        ("full", "exact", 0.5, 0.5),
        ("bpda", "stand-in", 0.5, 1.0),
        ("full", "stand-in", 0.5, 1 / 3),
    ],
)
def test_knowledge_decides_value_and_slope(knowledge: str, gradient: str, value: float, slope: float) -> None:
    seen, slopes = _seen(_shield(Halves(), gradient=gradient), knowledge)
    assert torch.equal(seen, TOY.images * value), "the deployed value, to the last bit"
    assert torch.allclose(slopes, torch.full_like(slopes, slope))


def test_without_a_defence_everybody_sees_the_pixels() -> None:
    for knowledge in ("none", "oblivious", "bpda", "full"):
        seen, slopes = _seen(None, knowledge)
        assert torch.equal(seen, TOY.images)
        assert torch.equal(slopes, torch.ones_like(slopes))


def test_bpda_goes_through_a_defence_that_changes_the_size() -> None:
    seen, slopes = _seen(_shield(Shrinks()), "bpda")
    assert torch.equal(seen, Shrinks().apply(TOY.images))
    assert (slopes > 0).all()


def test_the_deployed_encoder_sees_what_the_defence_returns() -> None:
    victim = DefendedEncoder(encoder=TOY.encoder, shield=_shield(Halves()))
    with torch.no_grad():
        assert torch.equal(victim.features(TOY.images), TOY.encoder(TOY.images * 0.5))
        assert torch.equal(victim.logits(TOY.images, TOY.head), TOY.logits(TOY.images * 0.5))
    assert not victim.stochastic
    assert DefendedEncoder(encoder=TOY.encoder, shield=_shield(Halves(), stochastic=True)).stochastic


def test_nan_of_one_image_stays_with_that_image() -> None:
    class Breaks:
        """NaN in the second image."""

        def apply(self, images: Tensor) -> Tensor:
            out = images.clone()
            out[1, 0, 0, 0] = torch.nan
            return out

    with torch.no_grad():
        features = DefendedEncoder(encoder=TOY.encoder, shield=_shield(Breaks())).features(TOY.images)
        plain = TOY.encoder(TOY.images)
    assert features[1].isnan().all()
    assert torch.allclose(features[2:], plain[2:], atol=1e-6)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda x: x[:-1], SampleError, "turned images of shape"),
        (lambda x: x[:, :1], SampleError, "turned images of shape"),
        (lambda x: x[0], SampleError, "turned images of shape"),
        (lambda x: None, SampleError, "returned a NoneType, not a tensor"),
        (lambda x: x * 3, RangeError, r"pixels must lie in \[0, 1\]"),
        (lambda x: x - 1, RangeError, r"pixels must lie in \[0, 1\]"),
    ],
)
def test_a_defence_must_return_images(returned: Any, error: type[Exception], message: str) -> None:
    class Planted:
        """Breaks its promise."""

        def apply(self, images: Tensor) -> Tensor:
            out: Tensor = returned(images)
            return out

    with pytest.raises(error, match=message):
        DefendedEncoder(encoder=TOY.encoder, shield=_shield(Planted())).features(TOY.images)


def test_images_out_of_range_are_refused_before_any_defence() -> None:
    with pytest.raises(RangeError, match="normalisation belongs to the model"):
        DefendedEncoder(encoder=TOY.encoder, shield=_shield(Halves())).features(TOY.images * 1.5)


def test_a_defence_cannot_write_to_what_it_is_given() -> None:
    class Writes:
        """In place."""

        def apply(self, images: Tensor) -> Tensor:
            return images.mul_(0.5)

        def stand_in(self, images: Tensor) -> Tensor:
            return images.mul_(0.5)

    images = TOY.images.clone()
    for gradient in ("exact", "stand-in"):
        shield = _shield(Writes(), gradient=gradient)
        for knowledge in ("bpda", "full"):
            seen = perceive(shield, knowledge)(images)
            assert torch.equal(images, TOY.images)
            assert torch.equal(seen, TOY.images * 0.5)


def test_a_fresh_draw_is_seeded_and_leaves_no_trace() -> None:
    state, device = torch.get_rng_state(), torch.device("cpu")
    draws = []
    for seed in (1, 1, 2):
        with fresh_draw(seed, device):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)
