"""Iterative attacks that aim: the known optimum of a linear encoder, ensembles, captions, and what they refuse."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder, Preprocessing, Tokens
from robustbench_x.encoders.text import TextTower
from robustbench_x.errors import AttackError, ConfigError
from robustbench_x.randomness import SampleRandom, derive_seed
from robustbench_x.registry import load_registry
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderHandle, EncoderView, Meter

REGISTRY = load_registry()
AIMED = [REGISTRY.attacks[name] for name in ("attackvlm_ii", "attackvlm_it", "m_attack", "ssa_cwa")]
THREAT = ThreatModel(eps=16 / 255)
SIDE = 16
QUICK = {"attackvlm_ii": {"steps": 40}, "m_attack": {"steps": 40}, "ssa_cwa": {"steps": 25, "samples": 4}}

WEIGHT = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


class _Slope(nn.Module):
    """Features (1, w.(x - 0.5)): the cosine to a target grows as w.x nears the target's, so one sign pattern wins."""

    layers: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.flatten())

    def pooled(self, images: Tensor) -> Tensor:
        score = (images.flatten(1) - 0.5) @ self.weight
        return torch.stack([torch.ones_like(score), score], dim=1)

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        return []


class _Projection(nn.Module):
    """A random projection of a smoothed image, to 16 numbers."""

    layers: tuple[str, ...] = ()

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(16, 3 * 4 * 4, generator=generator))

    def pooled(self, images: Tensor) -> Tensor:
        return (F.adaptive_avg_pool2d(images, 4).flatten(1) - 0.5) @ self.weight.T

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        return []


def _encoder(backbone: nn.Module) -> Encoder:
    preprocessing = Preprocessing(input_size=(SIDE, SIDE))
    return Encoder(source=type(backbone).__name__, backbone=backbone, preprocessing=preprocessing)  # type: ignore[arg-type]


SLOPE = _encoder(_Slope())
FIRST, SECOND, THIRD = (_encoder(_Projection(seed)) for seed in (1, 2, 3))


def _images(seed: int, count: int = 6) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return 0.2 + 0.6 * F.interpolate(coarse, (SIDE, SIDE), mode="nearest")


def _handle(encoder: Encoder, **more: Any) -> EncoderHandle:
    return EncoderHandle(encoder, lambda images: images, Meter(), **more)


def _view(encoder: EncoderHandle, partners: Sequence[Encoder] = (), **more: Any) -> EncoderView:
    inputs = _images(0)
    given: dict[str, Any] = {
        "inputs": inputs,
        "threat": THREAT,
        "random": SampleRandom([derive_seed("sample", i) for i in range(len(inputs))]),
        "encoder": encoder,
        "partners": tuple(_handle(partner) for partner in partners),
        "targets": _images(1),
    }
    return EncoderView(**{**given, **more})


def _run(name: str, view: EncoderView, **params: object) -> Tensor:
    images: Tensor = REGISTRY.attacks[name].build({**QUICK.get(name, {}), **params}).run(view)
    assert float(view.threat.overrun(images, view.inputs).max()) < 1e-6
    return images


@torch.no_grad()
def _closeness(encoder: Encoder, images: Tensor) -> float:
    return float(F.cosine_similarity(encoder(images), encoder(_images(1)), dim=1).mean())


def _optimum(inputs: Tensor, direction: Tensor) -> Tensor:
    """The one sign pattern: every pixel by eps, as its weight says."""
    return inputs + THREAT.eps * WEIGHT.sign() * direction.view(-1, 1, 1, 1)


# -- AttackVLM


def test_attackvlm_ii_reaches_the_optimum_of_a_linear_encoder() -> None:
    view = _view(_handle(SLOPE))
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    # Targets whose score no change within the budget reaches.
    targets = 0.5 + 0.5 * sign.view(-1, 1, 1, 1) * WEIGHT.sign()
    images = _run("attackvlm_ii", replace(view, targets=targets), steps=20)
    torch.testing.assert_close(images, _optimum(view.inputs, sign), rtol=0, atol=1e-6)


def test_attackvlm_it_aims_at_the_caption_and_reads_no_target_image() -> None:
    heard: list[str] = []

    def embed(texts: Sequence[str]) -> Tensor:
        heard.extend(texts)
        return torch.tensor([[1.0, 1e3 if "more" in text else -1e3] for text in texts])

    tower = TextTower(embed=embed, scale=100.0, sha256="toy")
    captions = ("more", "less", "no more", "less", "less", "more")
    view = _view(_handle(SLOPE, text=tower), targets=None, target_texts=captions)
    images = _run("attackvlm_it", view, steps=20)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    torch.testing.assert_close(images, _optimum(view.inputs, sign), rtol=0, atol=1e-6)
    assert tuple(heard) == captions


def test_attackvlm_it_says_what_is_missing() -> None:
    with pytest.raises(AttackError, match="this data has none: choose data with captions, or attackvlm_ii"):
        _run("attackvlm_it", _view(_handle(SLOPE)))
    with pytest.raises(AttackError, match="reads no text"):
        _run("attackvlm_it", _view(_handle(SLOPE), target_texts=("a",) * 6))


def test_attackvlm_averages_over_a_random_victim() -> None:
    meter = Meter()
    handle = EncoderHandle(FIRST, lambda images: images, meter, stochastic=True)
    _run("attackvlm_ii", _view(handle), steps=2, eot=3)
    count = 6
    assert (meter.forwards, meter.backwards) == ((1 + 2 * 3 + 1) * count, 2 * 3 * count)


# -- crops and spectra


@pytest.mark.parametrize("name", ["attackvlm_ii", "m_attack", "ssa_cwa"])
def test_the_target_comes_nearer_than_by_noise(name: str) -> None:
    view = _view(_handle(FIRST))
    images = _run(name, view)
    noise = THREAT.noise(view.inputs, SampleRandom(list(range(6))))
    assert _closeness(FIRST, images) > _closeness(FIRST, noise) + 0.15


@pytest.mark.parametrize("name", ["m_attack", "ssa_cwa"])
def test_the_ensemble_is_the_encoder_and_its_partners(name: str) -> None:
    clean = [_closeness(encoder, _images(0)) for encoder in (FIRST, SECOND, THIRD)]

    def gains(view: EncoderView, **params: object) -> list[float]:
        images = _run(name, view, **params)
        return [
            _closeness(encoder, images) - before for encoder, before in zip((FIRST, SECOND, THIRD), clean, strict=True)
        ]

    together = gains(_view(_handle(FIRST), [SECOND, THIRD]))
    assert min(together) > 0.1
    alone = gains(_view(_handle(FIRST)))
    assert alone[0] > max(alone[1:]) + 0.05
    meter = Meter()
    unseen = EncoderHandle(FIRST, lambda images: images, meter)
    transfer = gains(_view(unseen, [SECOND, THIRD]), own=False)
    assert min(transfer[1:]) > 0.1
    assert meter.forwards == 0, "pure transfer never asks the victim"


@pytest.mark.parametrize("name", ["m_attack", "ssa_cwa"])
def test_the_victim_is_in_the_ensemble_once_at_most(name: str) -> None:
    twice, once = (_run(name, _view(_handle(FIRST), partners)) for partners in ([FIRST], []))
    assert torch.equal(twice, once)
    with pytest.raises(AttackError, match=r"no encoder but the audited one \(a,b\); name another, or own=true"):
        _run(name, _view(_handle(FIRST), [FIRST]), own=False, encoders="a,b")
    spec = REGISTRY.attacks[name]
    assert spec.partners(spec.build({"encoders": " a:b?x=1 ,c:d"})) == ("a:b?x=1", "c:d")
    assert spec.partners(spec.build()) == ()


def test_m_attack_looks_at_the_target_in_every_step_unless_it_stays_whole() -> None:
    for crop, looks in ((True, 2 * 5), (False, 5 + 1)):
        meter = Meter()
        handle = EncoderHandle(FIRST, lambda images: images, meter)
        _run("m_attack", _view(handle), steps=5, crop_target=crop)
        assert meter.forwards == looks * 6
        assert meter.backwards == 5 * 6


def test_ssa_cwa_costs_its_samples_for_every_encoder() -> None:
    meter = Meter()
    handle = EncoderHandle(FIRST, lambda images: images, meter)
    _run("ssa_cwa", _view(handle), steps=3, samples=4)
    assert (meter.forwards, meter.backwards) == ((1 + 3 * 4) * 6, 3 * 4 * 6)


def test_ssa_cwa_first_steps_by_the_sign_of_the_inner_change() -> None:
    """Without noise, mask or chance, on a linear encoder: inner step along the gradient, outer one along its sign."""
    view = _view(_handle(SLOPE), targets=(WEIGHT > 0).float().expand(6, -1, -1, -1))
    images = _run("ssa_cwa", view, steps=1, samples=1, sigma=0.0, rho=0.0, step_size=2 / 255)
    torch.testing.assert_close(images, view.inputs + 2 / 255 * WEIGHT.sign(), rtol=0, atol=1e-6)


def test_a_gradient_that_is_no_number_becomes_an_error_and_spares_the_others() -> None:
    class _Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, images: Tensor) -> Tensor:
            return images.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            broken = gradient.clone()
            broken[2] = torch.nan
            return broken

    handle = EncoderHandle(FIRST, lambda images: _Breaks.apply(images), Meter())
    for name in ("ssa_cwa", "m_attack", "attackvlm_ii"):
        images = REGISTRY.attacks[name].build({**QUICK[name], "steps": 2}).run(_view(handle))
        assert images[2].isnan().all()
        assert images[[0, 1, 3, 4, 5]].isfinite().all()


# -- all of them


@pytest.mark.parametrize("spec", AIMED, ids=lambda spec: spec.name)
def test_they_aim_at_targets_through_the_encoder_alone(spec: Any) -> None:
    assert (spec.access, spec.goal, spec.aims, spec.norms) == ("encoder", "targeted", True, ("linf",))
    view = _view(_handle(FIRST), targets=None, threat=ThreatModel(eps=0))
    assert torch.equal(spec.build().run(view), view.inputs), "no budget, no change"


@pytest.mark.parametrize("name", ["attackvlm_ii", "m_attack", "ssa_cwa"])
def test_without_targets_they_say_so(name: str) -> None:
    with pytest.raises(AttackError, match="aims at a target image per sample, and it was handed none"):
        _run(name, _view(_handle(FIRST), targets=None))


@pytest.mark.parametrize("name", ["m_attack", "ssa_cwa"])
def test_an_image_s_result_does_not_depend_on_its_batch(name: str) -> None:
    whole = _run(name, _view(_handle(FIRST)))
    seeds = [derive_seed("sample", i) for i in range(2)]
    part = _view(_handle(FIRST), inputs=_images(0)[:2], targets=_images(1)[:2], random=SampleRandom(seeds))
    torch.testing.assert_close(_run(name, part), whole[:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("attackvlm_ii", {"steps": 0}, "steps and eot must be at least 1"),
        ("attackvlm_it", {"step_size": 0}, "step_size=0.0 must be positive"),
        ("m_attack", {"steps": 0}, "steps=0 must be at least 1"),
        ("m_attack", {"step_size": -1}, "step_size=-1.0 must be positive"),
        ("m_attack", {"least": 0.9, "most": 0.5}, "least=0.9 and most=0.5 must be in order"),
        ("ssa_cwa", {"samples": 0}, "steps and samples must be at least 1"),
        ("ssa_cwa", {"inner_size": 0}, "inner_size=0.0 must be positive"),
        ("ssa_cwa", {"decay": -1}, "decay=-1.0 must not be negative"),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: {message}"):
        REGISTRY.attacks[name].build(params)
