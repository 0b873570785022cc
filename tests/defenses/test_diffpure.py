"""Diffusion purification against the schedulers of diffusers, and against models that know the answer."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from robustbench_x.errors import ConfigError, MissingExtraError
from robustbench_x.plugin import DefenseSpec
from robustbench_x.testing import DEFENSE_CHECKS
from robustbench_x_defenses.preprocess import diffpure
from robustbench_x_defenses.preprocess.diffpure import SPEC, DiffPure

TOTAL = 20
NETWORK = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def save(folder: Path, *, nested: bool = False, schedule: dict[str, Any] | None = None, **network: Any) -> str:
    from diffusers import DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = UNet2DModel(**{**NETWORK, **network})
    scheduler = DDPMScheduler(num_train_timesteps=TOTAL, beta_end=0.3, **(schedule or {}))
    model.save_pretrained(folder / "unet" if nested else folder)
    scheduler.save_pretrained(folder / "scheduler" if nested else folder)
    return str(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


@pytest.mark.parametrize("check", DEFENSE_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("steps", [0, 2])
def test_it_keeps_the_contract(check: Callable[[DefenseSpec], None], weights: str, steps: int) -> None:
    # The same class, with defaults that can be built.
    given = {"weights": weights, "steps": steps}
    fields = [
        (f.name, f.type, dataclasses.field(default=given.get(f.name, f.default), metadata=dict(f.metadata)))
        for f in dataclasses.fields(DiffPure)
    ]
    factory = dataclasses.make_dataclass("Tiny", fields, bases=(DiffPure,), frozen=True, kw_only=True)
    check(dataclasses.replace(SPEC, factory=factory))


def test_all_steps_are_those_of_ddpm(weights: str) -> None:
    from diffusers import DDPMScheduler, UNet2DModel

    images = torch.rand(2, 3, 16, 16)
    torch.manual_seed(11)
    out = DiffPure(weights=weights, t=0.4).apply(images)
    network, scheduler = UNet2DModel.from_pretrained(weights), DDPMScheduler.from_pretrained(weights)
    torch.manual_seed(11)
    x, last = 2 * images - 1, round(0.4 * TOTAL) - 1
    with torch.no_grad():
        x = scheduler.add_noise(x, torch.randn_like(x), torch.full((2,), last))
        for step in range(last, -1, -1):
            x = scheduler.step(network(x, step).sample, step, x).prev_sample
    assert float((out - (x / 2 + 0.5).clamp(0, 1)).abs().max()) < 1e-4


def test_fewer_steps_are_those_of_ddim(weights: str) -> None:
    from diffusers import DDIMScheduler, UNet2DModel

    images = torch.rand(2, 3, 16, 16)
    torch.manual_seed(11)
    out = DiffPure(weights=weights, t=0.6, steps=3).apply(images)
    network, scheduler = UNet2DModel.from_pretrained(weights), DDIMScheduler.from_pretrained(weights)
    scheduler.set_timesteps(5)  # 20 / 5: steps of four, as 12 / 3
    torch.manual_seed(11)
    x = 2 * images - 1
    with torch.no_grad():
        x = scheduler.add_noise(x, torch.randn_like(x), torch.full((2,), 11))
        for step in (11, 7, 3):
            x = scheduler.step(network(x, step).sample, step, x, use_clipped_model_output=True).prev_sample
    assert float((out - (x / 2 + 0.5).clamp(0, 1)).abs().max()) < 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_model_that_knows_the_clean_image_finds_it(
    prediction: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, kept = torch.rand(1, 3, 8, 8), torch.linspace(0.99, 0.05, TOTAL)

    def network(noisy: Tensor, step: int) -> SimpleNamespace:
        target, signal, noise = 2 * clean - 1, kept[step].sqrt(), (1 - kept[step]).sqrt()
        added = (noisy - signal * target) / noise
        known = {"epsilon": added, "sample": target, "v_prediction": signal * added - noise * target}
        return SimpleNamespace(sample=known[prediction])

    prior = diffpure._Prior(network=network, size=(8, 8), kept=kept, prediction=prediction, clip=0.0)
    monkeypatch.setattr(diffpure, "_prior", lambda weights, device: prior)
    out = DiffPure(weights="known", t=0.5, steps=steps).apply(torch.rand(3, 3, 8, 8))
    assert float((out - clean).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("t", "steps", "total", "path"),
    [
        (0.15, 3, 1000, [149, 99, 49]),
        (0.1, 0, 50, [4, 3, 2, 1, 0]),
        (0.1, 5, 50, [4, 3, 2, 1, 0]),
        (1e-4, 0, 1000, [0]),
    ],
)
def test_the_path_goes_evenly_from_n_to_the_image(t: float, steps: int, total: int, path: list[int]) -> None:
    assert DiffPure(t=t, steps=steps).path(total) == path


@pytest.mark.parametrize("steps", [0, 2])
def test_the_gradient_is_that_of_finite_differences(weights: str, steps: int) -> None:
    images, direction = 0.3 + 0.4 * torch.rand(1, 3, 13, 18), torch.randn(1, 3, 13, 18)
    defense = DiffPure(weights=weights, t=0.2, steps=steps)

    def loss(pixels: Tensor) -> Tensor:
        torch.manual_seed(5)
        return defense.apply(pixels).square().sum()

    pixels = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(pixels), pixels)
    with torch.no_grad():
        slope = (loss(images + 1e-3 * direction) - loss(images - 1e-3 * direction)) / 2e-3
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=0.02, abs=0.02)


def test_a_pipeline_s_folders_are_found(weights: str, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 20, 20)
    outs = []
    for source in (weights, save(tmp_path, nested=True)):
        torch.manual_seed(3)
        outs.append(DiffPure(weights=source).apply(images))
    assert torch.equal(*outs)


def test_a_broken_image_stays_broken_and_alone(weights: str) -> None:
    images = torch.rand(2, 3, 20, 20)
    images[0, 0, 3, 3] = torch.nan
    out = DiffPure(weights=weights).apply(images)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_it_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match=r"^diffpure: weights is empty; give a diffusers UNet2DModel"):
        SPEC.build().apply(torch.rand(1, 3, 16, 16))
    with pytest.raises(MissingExtraError, match=r"diffpure needs the package diffusers: .*\[purification\]"):
        dataclasses.replace(SPEC, missing=lambda: True).build()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"t": 0}, "t=0.0 must lie above 0"),
        ({"t": 1.1}, "t=1.1 must lie above 0 and be at most 1"),
        ({"steps": -1}, "steps=-1 must be 0 or more"),
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^diffpure: {message}"):
        SPEC.build(params)


def test_more_steps_than_noise_are_refused(weights: str) -> None:
    with pytest.raises(ConfigError, match=r"diffpure: steps=9 are more than the 3 that t=0.15 adds"):
        DiffPure(weights=weights, steps=9).apply(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("network", "schedule", "message"),
    [
        ({"out_channels": 6}, {}, "must be unconditional, with 3 channels in and 3 out"),
        ({"num_class_embeds": 4}, {}, "must be unconditional"),
        ({"sample_size": None}, {}, "has no sample_size"),
        ({}, {"thresholding": True}, "dynamic thresholding, which is not supported"),
    ],
)
def test_models_of_another_kind_are_refused(
    network: dict[str, Any], schedule: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = save(tmp_path, schedule=schedule, **network)
    with pytest.raises(ConfigError, match=f"^diffpure: weights=.*{message}"):
        DiffPure(weights=source).apply(torch.rand(1, 3, 16, 16))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^diffpure: weights=.* cannot be loaded as a UNet2DModel: "):
        DiffPure(weights=str(tmp_path)).apply(torch.rand(1, 3, 16, 16))
