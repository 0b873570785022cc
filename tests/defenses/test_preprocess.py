"""Preprocessing defences against what they are defined by: reference implementations, formulas, known optima."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import scipy.ndimage
import skimage.data
import skimage.restoration
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import resized_crop

from robustbench_x.errors import ConfigError
from robustbench_x.plugin import DefenseSpec
from robustbench_x.victim import Shield, perceive
from robustbench_x_defenses.jpeg import JPEG
from robustbench_x_defenses.preprocess import specs
from robustbench_x_defenses.preprocess.bit_depth import BitDepth
from robustbench_x_defenses.preprocess.crop_ensemble import CropEnsemble
from robustbench_x_defenses.preprocess.edsr import Edsr
from robustbench_x_defenses.preprocess.gaussian_noise import GaussianNoise
from robustbench_x_defenses.preprocess.jpeg_random import RandomJPEG
from robustbench_x_defenses.preprocess.median import Median
from robustbench_x_defenses.preprocess.resize_pad import ResizePad
from robustbench_x_defenses.preprocess.super_resolution import SuperResolution
from robustbench_x_defenses.preprocess.tvm import TotalVariation
from robustbench_x_defenses.preprocess.wavelet import denoise

SPECS = {spec.name: spec for spec in specs() if spec.name != "diffpure"}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    image = PIL.Image.fromarray(skimage.data.astronaut()).resize((67, 51))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def build(name: str, **params: Any) -> Any:
    return SPECS[name].build(params)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [(19, 33), (33, 8), (5, 7)], ids=str)
def test_any_size_will_do(name: str, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    out = build(name).apply(images)
    assert out.shape[0] == 2
    assert out.shape[-3] == 3
    assert out.dtype == torch.float32
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    if name not in ("resize_pad", "crop_ensemble"):
        assert out.shape == images.shape


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_image_stays_broken_and_alone(name: str, bad: float) -> None:
    images = torch.rand(2, 3, 20, 17)
    images[0, 1, 4, 6] = bad
    out = build(name).apply(images)
    assert not out[0].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.stochastic])
def test_every_image_and_every_call_has_a_draw_of_its_own(name: str) -> None:
    images = torch.rand(1, 3, 40, 40).expand(6, -1, -1, -1)
    first, second = build(name).apply(images), build(name).apply(images)
    assert any(not torch.equal(first[0], out) for out in first[1:])
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("bit_depth", {"bits": 0}, "bits=0 must lie between 1 and 8"),
        ("bit_depth", {"bits": 9}, "bits=9 must"),
        ("median", {"kernel": 1}, "kernel=1 must lie between 2 and 15"),
        ("gaussian_noise", {"sigma": 0}, "sigma=0.0 must lie above 0"),
        ("gaussian_noise", {"sigma": float("nan")}, "sigma=nan must"),
        ("jpeg_random", {"low": 0}, "low=0 and high=75 must leave two"),
        ("jpeg_random", {"low": 74}, "low=74 and high=75 must leave two"),
        ("jpeg_random", {"high": 97}, "high=97 must leave two"),
        ("resize_pad", {"ratio": 1}, "ratio=1.0 must lie above 1"),
        ("resize_pad", {"fill": 1.5}, "fill=1.5 must lie between 0 and 1"),
        ("crop_ensemble", {"crops": 0}, "crops=0 must lie between 1 and 100"),
        ("crop_ensemble", {"area": 1}, "area=1.0 must lie between 0 and 1"),
        ("tvm", {"keep": 1}, "keep=1.0 must lie between 0 and 1"),
        ("tvm", {"weight": 0}, "weight=0.0 must lie above 0"),
        ("tvm", {"steps": 0}, "steps=0 must lie between 1 and 10000"),
        ("super_resolution", {"sigma": -0.1}, "sigma=-0.1 must lie between 0 and 1"),
        ("super_resolution", {"weights": "edsr.pt"}, "weights=edsr.pt must be a .safetensors file"),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: .*{message}"):
        build(name, **params)


@pytest.mark.parametrize(
    "apply",
    [
        Median(kernel=2).apply,
        Median().apply,
        GaussianNoise(sigma=0.01).apply,
        ResizePad().apply,
        CropEnsemble(crops=2).apply,
        TotalVariation(steps=9).apply,
        SuperResolution(sigma=0.05).apply,
    ],
    ids=lambda apply: type(apply.__self__).__name__,
)
def test_gradients_are_those_of_finite_differences(apply: Callable[[Tensor], Tensor]) -> None:
    images = 0.2 + 0.6 * torch.rand(1, 3, 4, 5, dtype=torch.float64)

    def seeded(pixels: Tensor) -> Tensor:
        torch.manual_seed(3)
        return apply(pixels)

    assert torch.autograd.gradcheck(seeded, images.requires_grad_(True), eps=1e-7, atol=1e-5)


# bit_depth


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_bit_depth_is_the_formula(bits: int) -> None:
    images = torch.rand(2, 3, 9, 11)
    top = np.float32(2**bits - 1)
    out = BitDepth(bits=bits).apply(images).numpy()
    assert np.array_equal(out, np.rint(images.numpy() * top) / top)
    assert len(np.unique(out)) <= 2**bits


def test_bit_depth_keeps_an_eight_bit_image_at_eight_bits() -> None:
    levels = (torch.arange(256).float() / 255).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert torch.equal(BitDepth(bits=8).apply(levels), levels)


@pytest.mark.parametrize("knowledge", ["bpda", "full"])
def test_straight_through_gradients_of_a_linear_model_are_its_weights(knowledge: Any) -> None:
    shield = Shield(spec=SPECS["bit_depth"], defense=BitDepth())
    pixels, weights = torch.rand(2, 3, 8, 8).requires_grad_(True), torch.randn(3, 8, 8)
    (gradient,) = torch.autograd.grad((perceive(shield, knowledge)(pixels) * weights).sum(), pixels)
    assert torch.equal(gradient, weights.expand(2, -1, -1, -1))


# median


@pytest.mark.parametrize("kernel", [2, 3, 4, 7])
@pytest.mark.parametrize("size", [(17, 23), (3, 2)], ids=str)
def test_median_is_scipy_s(kernel: int, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    expected = scipy.ndimage.median_filter(images.numpy(), size=(1, 1, kernel, kernel), mode="reflect")
    assert np.array_equal(Median(kernel=kernel).apply(images).numpy(), expected)


def test_median_hands_every_gradient_to_one_pixel() -> None:
    pixels = torch.rand(1, 3, 12, 12).requires_grad_(True)
    (gradient,) = torch.autograd.grad(Median().apply(pixels).sum(), pixels)
    assert float(gradient.sum()) == 3 * 12 * 12
    assert torch.equal(gradient, gradient.round())


# gaussian_noise


def test_noise_has_the_deviation_and_averages_out() -> None:
    images = 0.3 + 0.4 * torch.rand(1, 3, 6, 7)
    draws = GaussianNoise().apply(images.expand(4000, -1, -1, -1))
    assert float((draws.mean(dim=0) - images[0]).abs().max()) < 5 * 0.03 / 4000**0.5
    assert float(draws.std(dim=0).sub(0.03).abs().max()) < 0.002


def test_the_mean_gradient_under_noise_is_the_gradient_of_the_mean() -> None:
    # E[(x + n)^2] = x^2 + sigma^2: its gradient is 2x, where no pixel is clipped.
    images = (0.3 + 0.4 * torch.rand(1, 3, 4, 4)).expand(4000, -1, -1, -1).clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(GaussianNoise().apply(images).square().sum(), images)
    assert float((gradient.mean(dim=0) - 2 * images[0].detach()).abs().max()) < 5 * 2 * 0.03 / 4000**0.5


def test_a_black_image_still_has_a_gradient_under_noise() -> None:
    pixels = torch.zeros(1, 3, 8, 8).requires_grad_(True)
    (gradient,) = torch.autograd.grad(GaussianNoise().apply(pixels).sum(), pixels)
    assert 0.3 < float((gradient > 0).float().mean()) < 0.7


# jpeg_random


def test_every_image_is_compressed_at_a_quality_of_the_range() -> None:
    images = torch.rand(1, 3, 24, 24)
    qualities = {q: JPEG(quality=q).apply(images)[0] for q in (60, 61, 62)}
    out = RandomJPEG(low=60, high=62).apply(images.expand(20, -1, -1, -1))
    found = [[q for q, decoded in qualities.items() if torch.equal(decoded, image)] for image in out]
    assert {q for match in found for q in match} == {60, 61}
    assert all(found)


def test_the_stand_in_draws_nothing_and_has_the_middle_quality() -> None:
    images, state = torch.rand(2, 3, 24, 24), torch.get_rng_state()
    assert torch.equal(RandomJPEG().stand_in(images), JPEG(quality=64).stand_in(images))
    assert torch.equal(torch.get_rng_state(), state)


# resize_pad


def test_resize_pad_is_pillow_s_nearest_neighbour_in_a_grey_frame() -> None:
    images = 0.6 + 0.4 * torch.rand(1, 3, 30, 45)
    sizes, places = set(), set()
    for out in ResizePad().apply(images.expand(300, -1, -1, -1)):
        assert out.shape == (3, 33, 50)
        rows, columns = (out[0] != 0.5).any(dim=1).nonzero().flatten(), (out[0] != 0.5).any(dim=0).nonzero().flatten()
        top, left, height, width = int(rows[0]), int(columns[0]), len(rows), len(columns)
        for channel in range(3):
            enlarged = PIL.Image.fromarray(images[0, channel].numpy()).resize(
                (width, height), PIL.Image.Resampling.NEAREST
            )
            assert np.array_equal(out[channel, top : top + height, left : left + width].numpy(), np.asarray(enlarged))
        assert int((out[0] != 0.5).sum()) == height * width
        sizes.add(height)
        places.add((height, top))
    assert sizes == {30, 31, 32}
    assert places == {(height, top) for height in sizes for top in range(33 - height + 1)}


def test_resize_pad_has_the_sizes_of_the_paper() -> None:
    out = ResizePad(fill=0).apply(torch.ones(600, 3, 299, 2))[:, 0, :, :]
    assert out.shape[1] == 331
    heights = out.amax(dim=2).sum(dim=1)
    assert set(heights.int().tolist()) == set(range(299, 331))


# crop_ensemble


def test_every_look_is_a_crop_resized() -> None:
    image = torch.rand(1, 3, 20, 31)
    looks = CropEnsemble(crops=60).apply(image)
    assert looks.shape == (1, 60, 3, 20, 31)
    size = (18, 29)  # 90% of the area
    crops = {
        (top, left): resized_crop(image[0], top, left, *size, [20, 31], antialias=False)
        for top in range(3)
        for left in range(3)
    }
    found = [[place for place, crop in crops.items() if torch.allclose(crop, look, atol=1e-6)] for look in looks[0]]
    assert {place for match in found for place in match} == set(crops)
    assert all(found)


def test_the_paper_s_crops_have_90_of_299_pixels() -> None:
    ramp = torch.linspace(0, 1, 299)[None, None, None].expand(1, 3, 299, -1)
    looks = CropEnsemble(crops=3, area=(90 / 299) ** 2).apply(ramp)
    spans = looks.amax(dim=-1) - looks.amin(dim=-1)
    assert torch.allclose(spans, torch.tensor(89 / 298), atol=1e-5)


# tvm


def objective(result: Tensor, images: Tensor, mask: Tensor, weight: float = 0.03) -> float:
    result = result.double()
    down, right = F.pad(result.diff(dim=-2), (0, 0, 0, 1)), F.pad(result.diff(dim=-1), (0, 1))
    return float((mask * (result - images) ** 2).sum() + weight * (down**2 + right**2).sqrt().sum())


def test_tvm_comes_close_to_the_optimum_from_half_the_pixels(photograph: Tensor) -> None:
    mask = (torch.rand_like(photograph) < 0.5).float()
    best = objective(TotalVariation(steps=1000).rebuild(photograph, mask), photograph, mask)
    reached = objective(TotalVariation().rebuild(photograph, mask), photograph, mask)
    assert best * (1 - 1e-4) < reached < 1.005 * best


def test_tvm_from_all_pixels_is_scikit_image_s_chambolle(photograph: Tensor) -> None:
    # It minimises |z - x|^2 / 2 + weight * TV(z), which is half of ours at half the weight.
    theirs = skimage.restoration.denoise_tv_chambolle(
        photograph[0].double().numpy(), weight=0.03 / 2, max_num_iter=1000, eps=1e-12, channel_axis=0
    )
    mask = torch.ones_like(photograph)
    found = TotalVariation(steps=400).rebuild(photograph, mask)
    assert float((found[0] - torch.from_numpy(theirs)).abs().max()) < 2e-3
    best = objective(torch.from_numpy(theirs)[None], photograph, mask)
    assert objective(TotalVariation().rebuild(photograph, mask), photograph, mask) < 1.005 * best


def test_tvm_pulls_the_sides_of_a_step_together_by_weight_over_width() -> None:
    step = (torch.arange(16) >= 8).float().expand(1, 3, 10, 16)
    result = TotalVariation(weight=0.4, steps=1000).rebuild(step, torch.ones_like(step))
    assert torch.allclose(result, step.clamp(0.4 / 16, 1 - 0.4 / 16), atol=1e-4)


def test_tvm_keeps_the_share_it_says() -> None:
    # A constant image is rebuilt exactly, and only kept pixels have a gradient.
    pixels = torch.full((4, 3, 40, 40), 0.5).requires_grad_(True)
    out = TotalVariation(keep=0.8, steps=1).apply(pixels)
    assert torch.allclose(out, pixels, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.sum(), pixels)
    assert abs(float((gradient != 0).float().mean()) - 0.8) < 0.02


# super_resolution


def pattern(height: int, width: int) -> Tensor:
    """Waves, a chessboard and a little hash noise, the same everywhere."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    board = 0.2 + 0.6 * ((x // 7 + y // 9) % 2)
    base = np.stack([0.5 + 0.3 * np.sin(0.21 * x + 0.1 * y), 0.5 + 0.3 * np.cos(0.17 * y), board])
    noise = np.sin(12.9898 * x + 78.233 * y + 37.7 * np.arange(3)[:, None, None]) * 43758.5453
    return torch.from_numpy(np.clip(base + 0.1 * (noise % 1 - 0.5), 0, 1))[None].float()


# scikit-image 0.26.0 with PyWavelets 1.8.0: denoise_wavelet(pattern, sigma=0.04, convert2ycbcr=True,
# method="BayesShrink", mode="soft", rescale_sigma=True, channel_axis=-1)[::13, ::17]
EXPECTED = {
    (53, 75): (0.51608, 0.8015, 0.20513, 0.37484, 0.77781, 0.22914, 0.72362, 0.81751, 0.22175, 0.21037, 0.7794,
               0.81446, 0.7926, 0.79924, 0.82105, 0.79002, 0.30716, 0.85952, 0.1771, 0.34155, 0.83942, 0.77049,
               0.31496, 0.78165, 0.29957, 0.34089, 0.17841, 0.50286, 0.3371, 0.23176),
    (64, 64): (0.5182, 0.80214, 0.20694, 0.37121, 0.77705, 0.22911, 0.72315, 0.81542, 0.21983, 0.20683, 0.77641,
               0.8121, 0.78412, 0.30471, 0.85557, 0.17764, 0.34005, 0.84118, 0.7697, 0.31816, 0.78007, 0.30238,
               0.34278, 0.17746, 0.59818, 0.44678, 0.23617, 0.45992, 0.44978, 0.18773),
}  # fmt: skip


@pytest.mark.parametrize("size", EXPECTED, ids=str)
def test_denoising_is_scikit_image_s(size: tuple[int, int]) -> None:
    picture = pattern(*size)
    calm = denoise(picture, 0.04)[0].permute(1, 2, 0)
    found = calm[::13, ::17].flatten()[:30]
    assert float((found - torch.tensor(EXPECTED[size])).abs().max()) < 1e-5
    assert float((calm - picture[0].permute(1, 2, 0)).abs().max()) > 0.05


def test_without_noise_the_transform_is_undone_exactly() -> None:
    images = torch.rand(2, 3, 37, 51)
    assert float((denoise(images, 0.0) - images).abs().max()) < 2e-6


def test_denoising_takes_noise_away(photograph: Tensor) -> None:
    noisy = photograph + 0.04 * torch.randn_like(photograph)
    before, after = (noisy - photograph).square().mean(), (denoise(noisy, 0.04) - photograph).square().mean()
    assert after < 0.8 * before


def test_bicubic_and_back_leaves_a_slope_as_it_is() -> None:
    slope = torch.linspace(0.1, 0.9, 30).expand(1, 3, 20, -1)
    out = SuperResolution(sigma=0).apply(slope)
    assert float((out - slope)[..., 3:-3].abs().max()) < 1e-5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = Edsr().state_dict()
    for name in ("sub_mean", "add_mean"):
        state |= {f"{name}.weight": torch.eye(3).view(3, 3, 1, 1), f"{name}.bias": torch.zeros(3)}
    path = tmp_path_factory.mktemp("edsr") / "edsr.safetensors"
    safetensors.torch.save_file(state, path)
    return path


def test_edsr_runs_on_published_weights(weights: Path) -> None:
    images, state = torch.rand(1, 3, 9, 7), safetensors.torch.load_file(weights)

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    mean = 255 * torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    head = conv(255 * images - mean, "head.0")
    deep = head
    for block in range(16):
        deep = deep + conv(conv(deep, f"body.{block}.body.0").relu(), f"body.{block}.body.2")
    shuffled = F.pixel_shuffle(conv(conv(deep, "body.16") + head, "tail.0.0"), 2)
    large = ((conv(shuffled, "tail.1") + mean) / 255).clamp(0, 1)
    assert large.shape == (1, 3, 18, 14)
    out = SuperResolution(sigma=0, weights=str(weights)).apply(images)
    assert torch.allclose(out, F.avg_pool2d(large, 2), atol=1e-5)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, weights: Path) -> None:
    images = torch.rand(1, 3, 8, 8)
    missing = SuperResolution(weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(ConfigError, match=r"^super_resolution: weights=.*none.safetensors cannot be read: "):
        missing.apply(images)
    (tmp_path / "text.safetensors").write_text("no weights", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"text.safetensors cannot be read: "):
        SuperResolution(weights=str(tmp_path / "text.safetensors")).apply(images)
    state = safetensors.torch.load_file(weights)
    del state["head.0.weight"]
    safetensors.torch.save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r'do not fit the EDSR x2 baseline: Missing key.*"head.0.weight"'):
        SuperResolution(weights=str(tmp_path / "part.safetensors")).apply(images)


def test_every_spec_is_registered_once() -> None:
    assert all(isinstance(spec, DefenseSpec) for spec in specs())
    assert len({spec.name for spec in specs()}) == len(specs()) == 9
