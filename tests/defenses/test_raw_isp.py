"""raw_isp: mosaics and the camera against plain numpy, F, G and S as one defence, its training, real pairs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kornia
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import skimage.data
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from command import Command
from project import registry
from robustbench_x.data.dataset import Item
from robustbench_x.engine.fit import FitRequest, fit_plugin
from robustbench_x.engine.supply import find_defense
from robustbench_x.errors import ConfigError, UsageError
from robustbench_x.fitting import read_artifact, run_training
from robustbench_x.fitting.defense_job import DefenseJob
from robustbench_x.fitting.ground import Ground, Pool
from robustbench_x.fitting.loop import Trained
from robustbench_x.fitting.patches import make_patches
from robustbench_x.plugin import Trainer
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import Shield, perceive
from robustbench_x.views import Meter
from robustbench_x_defenses.raw_isp.bayer import mosaic, pack, unpack
from robustbench_x_defenses.raw_isp.camera import CAMERA, smoothstep, smoothstep_inverse
from robustbench_x_defenses.raw_isp.conventional import _CFA, develop_raw, raw_from_rgb
from robustbench_x_defenses.raw_isp.defense import SPEC
from robustbench_x_defenses.raw_isp.networks import RawMapper, SmallISP
from robustbench_x_defenses.raw_isp.pairs import Pairs, pair_files
from robustbench_x_defenses.raw_isp.pynet import PyNET
from robustbench_x_defenses.raw_isp.train import _noisy, _sensor_noise, psnr

Array = NDArray[np.float64]
BLACK = 64 / 1020
QUICK: dict[str, Any] = {"artifact": "", "patch": 16, "f_steps": 3, "g_steps": 3, "batch": 2}
assert SPEC.shipped is not None
SHIPPED = SPEC.shipped / "raw_isp.safetensors"
needs_shipped = pytest.mark.skipif(not SHIPPED.is_file(), reason="the weights are not there yet")


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    image = PIL.Image.fromarray(skimage.data.astronaut()).resize((64, 48))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def smooth(count: int, height: int, width: int) -> Tensor:
    """Random images with the structure of a photograph: coarse colours and a little noise, away from the ends."""
    coarse = 0.2 + 0.5 * torch.rand(count, 3, 4, 4)
    fine = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return (fine + 0.02 * torch.randn(fine.shape)).clamp(0.05, 0.8)


def weights(g: str = "small") -> dict[str, Tensor]:
    """What a training would leave, at its start."""
    nets = nn.ModuleDict({"f": RawMapper(), "g": {"small": SmallISP, "pynet": PyNET}[g]()})
    return dict(nets.state_dict())


def deployed(learned: Mapping[str, Tensor], **params: Any) -> Any:
    return SPEC.build({"artifact": "", **params}).armed(learned)


# -- mosaics


def test_packed_raw_is_plain_indexing_and_goes_back() -> None:
    plane = torch.rand(2, 1, 8, 10)
    cells = plane[:, 0].numpy()
    by_hand = [cells[:, 1::2, 1::2], cells[:, 0::2, 1::2], cells[:, 0::2, 0::2], cells[:, 1::2, 0::2]]
    assert np.array_equal(pack(plane).numpy(), np.stack(by_hand, axis=1)), "B, Gb, R, Gr of an RGGB mosaic"
    assert torch.equal(unpack(pack(plane)), plane)
    packed = torch.rand(2, 4, 3, 5)
    assert torch.equal(pack(unpack(packed)), packed)


def test_a_mosaic_keeps_one_colour_a_site() -> None:
    rgb = torch.rand(2, 3, 6, 8)
    expected = np.empty((2, 6, 8), dtype=np.float32)
    for row, column, colour in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        expected[:, row::2, column::2] = rgb.numpy()[:, colour, row::2, column::2]
    assert np.array_equal(mosaic(rgb)[:, 0].numpy(), expected)


@pytest.mark.parametrize("shape", [(1, 1, 5, 6), (1, 1, 6, 5), (1, 3, 6, 6), (1, 6, 6)], ids=str)
def test_what_is_no_mosaic_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a mosaic is \(N, 1, 2H, 2W\)"):
        pack(torch.rand(shape))


def test_what_is_no_packed_raw_is_refused() -> None:
    with pytest.raises(ValueError, match=r"packed RAW is \(N, 4, H, W\)"):
        unpack(torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize("colour", [0, 1, 2])
def test_a_scene_of_one_colour_demosaics_to_that_colour(colour: int) -> None:
    """kornia calls RGGB "BG": with the obvious name red and blue change places."""
    scene = torch.zeros(1, 3, 12, 12)
    scene[:, colour] = 0.4
    back = kornia.color.raw_to_rgb(mosaic(scene), _CFA)
    assert torch.allclose(back[..., 2:-2, 2:-2], scene[..., 2:-2, 2:-2], atol=1e-6)
    shown = torch.full((1, 3, 24, 24), 0.1)
    shown[:, colour] = 0.6
    seen = develop_raw(raw_from_rgb(shown))[0, :, 3:-3, 3:-3].mean(dim=(1, 2))
    assert int(seen.argmax()) == colour


# -- the camera


XYZ_TO_CAMERA = np.array(
    [
        [[1.0234, -0.2969, -0.2266], [-0.5625, 1.6328, -0.0469], [-0.0703, 0.2188, 0.6406]],
        [[0.4913, -0.0541, -0.0202], [-0.613, 1.3513, 0.2906], [-0.1564, 0.2151, 0.7183]],
        [[0.838, -0.263, -0.0639], [-0.2887, 1.0725, 0.2496], [-0.0627, 0.1427, 0.5438]],
        [[0.6596, -0.2079, -0.0562], [-0.4782, 1.3016, 0.1933], [-0.097, 0.1581, 0.5181]],
    ]
)
RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
RGB_GAIN, RED, BLUE = 1 / 0.8, 2.15, 1.7


def to_camera() -> Array:
    matrix = XYZ_TO_CAMERA.mean(axis=0) @ RGB_TO_XYZ
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True), dtype=np.float64)


def brooks(image: Array) -> Array:
    """Unprocessing of Brooks et al. (2019) for one image `(H, W, 3)`, with fixed metadata, channels last as theirs."""
    image = 0.5 - np.sin(np.arcsin(1 - 2 * np.clip(image, 0, 1)) / 3)
    image = np.maximum(image, 1e-8) ** 2.2
    image = image @ to_camera().T
    gains = np.array([1 / RED, 1.0, 1 / BLUE]) / RGB_GAIN
    grey = image.mean(axis=-1, keepdims=True)
    mask = (np.maximum(grey - 0.9, 0) / 0.1) ** 2
    return np.asarray(np.clip(image * np.maximum(mask + (1 - mask) * gains, gains), 0, 1))


def develop(linear: Array) -> Array:
    """Balanced camera RGB `(3, H, W)` to sRGB."""
    linear = np.einsum("ij,jhw->ihw", np.linalg.inv(to_camera()), linear)
    shown = np.maximum(np.clip(linear, 0, 1), 1e-8) ** (1 / 2.2)
    return np.asarray(3 * shown**2 - 2 * shown**3)


def test_unprocessing_is_that_of_brooks() -> None:
    images = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    images[0, :, :3] = 0.98 + 0.02 * images[0, :, :3]  # highlights, where the safe gain differs
    images[1, :, 0] = 0
    expected = [brooks(image.permute(1, 2, 0).numpy()).transpose(2, 0, 1) for image in images]
    assert np.allclose(CAMERA.unprocess(images).numpy(), np.stack(expected), atol=1e-6)
    single = CAMERA.unprocess(images.float()).numpy()
    assert np.allclose(single, np.stack(expected), atol=2e-4)


def test_the_tone_curve_and_its_inverse_cancel() -> None:
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(smoothstep(smoothstep_inverse(x)), x, atol=1e-12)


def test_the_colour_matrix_keeps_grey() -> None:
    assert torch.allclose(CAMERA.from_srgb().sum(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-12)


def test_processing_undoes_unprocessing_but_for_highlights() -> None:
    """To 1e-5 in double precision, wherever the camera clips nothing; a white stays brighter than its gains allow."""
    images = 0.15 + 0.55 * smooth(3, 16, 16).double()
    camera = CAMERA.unprocess(images)
    inside = ((camera > 0) & (camera < 1)).all(dim=1, keepdim=True).expand_as(images)
    assert float(inside.float().mean()) > 0.95
    back = CAMERA.process(camera)
    assert torch.allclose(back[inside], images[inside], atol=1e-5)
    assert torch.allclose(CAMERA.process(CAMERA.unprocess(images.float()))[inside], images.float()[inside], atol=1e-3)
    white = torch.ones(1, 3, 2, 2)
    assert torch.allclose(CAMERA.process(CAMERA.unprocess(white)), white, atol=1e-3)


def test_s_is_its_steps_written_out() -> None:
    raw = BLACK + (1 - BLACK) * 0.3 * torch.rand(1, 4, 10, 12, dtype=torch.float64)
    blue, green_b, red, green_r = ((raw[0].numpy() - BLACK) / (1 - BLACK)).clip(0, 1)
    plane = np.empty((20, 24))
    for (row, column), site, gain in (
        ((0, 0), red, RED * RGB_GAIN),
        ((0, 1), green_b, RGB_GAIN),
        ((1, 0), green_r, RGB_GAIN),
        ((1, 1), blue, BLUE * RGB_GAIN),
    ):
        plane[row::2, column::2] = np.clip(site * gain, 0, 1)
    rows, columns = np.mgrid[0:20, 0:24]
    masks = [(rows % 2 == 0) & (columns % 2 == 0), rows % 2 != columns % 2, (rows % 2 == 1) & (columns % 2 == 1)]
    cross = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4
    square = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4
    rgb = [
        scipy.ndimage.convolve(plane * mask, kernel, mode="mirror")
        for mask, kernel in zip(masks, (square, cross, square), strict=True)
    ]
    expected = develop(np.stack(rgb)).reshape(3, 10, 2, 12, 2).mean(axis=(2, 4))
    inner = (slice(None), slice(1, -1), slice(1, -1))
    assert np.allclose(develop_raw(raw)[0].numpy()[inner], expected[inner], atol=1e-5)


def test_the_demosaicing_is_that_of_colour_demosaicing() -> None:
    colour_demosaicing = pytest.importorskip("colour_demosaicing")
    plane = torch.rand(1, 1, 14, 18, dtype=torch.float64)
    theirs = colour_demosaicing.demosaicing_CFA_Bayer_bilinear(plane[0, 0].numpy(), "RGGB")
    ours = kornia.color.raw_to_rgb(plane, _CFA)[0].permute(1, 2, 0).numpy()
    assert np.allclose(ours[2:-2, 2:-2], theirs[2:-2, 2:-2], atol=1e-6)


def test_s_develops_what_the_camera_recorded_to_the_halved_image(photograph: Tensor) -> None:
    images = smooth(2, 32, 48)
    assert float((develop_raw(raw_from_rgb(images)) - F.avg_pool2d(images, 2)).abs().mean()) < 0.015
    halved = F.avg_pool2d(photograph, 2)
    assert float(psnr(develop_raw(raw_from_rgb(photograph)), halved)) > 22


def test_recorded_raw_begins_at_the_black_level() -> None:
    raw = raw_from_rgb(torch.rand(1, 3, 8, 8))
    assert float(raw_from_rgb(torch.zeros(1, 3, 4, 4)).max()) == pytest.approx(BLACK, abs=1e-6)
    assert float(raw.min()) >= BLACK - 1e-6
    assert float(raw.max()) <= 1 + 1e-6


def test_s_has_a_gradient_that_is_its_slope() -> None:
    raw = BLACK + (1 - BLACK) * (0.1 + 0.2 * torch.rand(1, 4, 3, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(develop_raw, raw.requires_grad_(True), eps=1e-7, atol=1e-5)


# -- the networks


def test_sizes_of_the_networks() -> None:
    counts = {net: sum(p.numel() for p in net().parameters()) for net in (RawMapper, SmallISP, PyNET)}
    assert counts[RawMapper] == 114_884
    assert counts[SmallISP] == 1_144_428
    assert 40e6 < counts[PyNET] < 50e6
    texts = " ".join(p.help for p in SPEC.params)
    assert f"{counts[SmallISP] / 1e6:.1f} M" in texts
    assert f"pynet ({counts[PyNET] / 1e6:.0f} M)" in texts


def test_f_is_never_negative_and_keeps_the_size() -> None:
    raw = RawMapper()(torch.rand(2, 3, 9, 13)).detach()
    assert raw.shape == (2, 4, 9, 13)
    assert float(raw.min()) >= 0
    assert float(raw.max()) > 0


@pytest.fixture(scope="module")
def pynet_weights() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return weights("pynet")


@torch.no_grad()
def test_pynet_runs_on_images_of_any_size(pynet_weights: dict[str, Tensor]) -> None:
    net = PyNET().eval()
    out = net(torch.rand(2, 4, 32, 32))
    assert out.shape == (2, 3, 32, 32)
    assert 0 < float(out.min()) <= float(out.max()) < 1
    defense = deployed(pynet_weights, g="pynet")
    for size in ((20, 36), (9, 7), (16, 16)):
        images = torch.rand(1, 3, *size)
        assert defense.apply(images).shape == images.shape


# -- the defence


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """Weights of a short training, so that F answers as a camera does and G is more than grey."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        job = make_job(smooth(24, 32, 32), patch=32, f_steps=60, g_steps=40, batch=4)
        return job.run(None).tensors


@pytest.mark.parametrize("size", [(9, 7), (2, 3), (16, 16), (17, 33), (40, 24)], ids=str)
@torch.no_grad()
def test_any_size_will_do(size: tuple[int, int], trained: dict[str, Tensor]) -> None:
    images = torch.rand(2, 3, *size)
    out = deployed(trained).apply(images)
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert 0 <= float(out.min()) <= float(out.max()) <= 1


def test_an_image_of_a_single_row_is_refused_by_name(trained: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"images of \(1, 9\) pixels are too small to be padded"):
        deployed(trained).apply(torch.rand(1, 3, 1, 9))


@torch.no_grad()
def test_padding_changes_nothing_where_it_is_not_needed(trained: dict[str, Tensor]) -> None:
    """An image of odd size is treated as its own reflection continues it."""
    images = smooth(1, 24, 32)
    odd = images[..., :21, :27]
    padded = F.pad(odd, (0, 5, 0, 3), mode="reflect")
    assert torch.equal(deployed(trained).apply(odd), deployed(trained).apply(padded)[..., :21, :27])


@torch.no_grad()
def test_an_image_alone_and_in_a_batch_is_the_same(trained: dict[str, Tensor]) -> None:
    defense, images = deployed(trained), smooth(3, 20, 28)
    alone = torch.cat([defense.apply(image[None]) for image in images])
    assert torch.allclose(defense.apply(images), alone, atol=1e-6)
    assert torch.equal(defense.apply(images), defense.apply(images)), "deterministic"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@torch.no_grad()
def test_a_broken_image_stays_broken_and_alone(bad: float, trained: dict[str, Tensor]) -> None:
    defense, images = deployed(trained), smooth(2, 20, 17)
    whole = defense.apply(images)
    images[0, 1, 4, 6] = bad
    out = defense.apply(images)
    assert not out[0].isfinite().all()
    assert torch.allclose(out[1], whole[1], atol=1e-6)


def test_every_image_has_a_gradient(trained: dict[str, Tensor]) -> None:
    images = smooth(4, 16, 24)
    images[2], images[3] = 0, 1
    for omega in (0.7, 1.0):
        pixels = images.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(deployed(trained, omega=omega).apply(pixels).sum(), pixels)
        assert gradient.isfinite().all()
        assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    pixels = images[:2].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(deployed(trained, omega=0.0).apply(pixels).sum(), pixels)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all(), "through S alone"


def test_full_knowledge_is_the_defence_itself(trained: dict[str, Tensor]) -> None:
    """The slope along the gradient is that of the deployed value, so no attacker needs a trick."""
    defense = deployed({name: t.double() for name, t in trained.items()})
    defense.pipeline.double()
    images = smooth(1, 16, 16).double().requires_grad_(True)
    direction = torch.randn(images.shape, dtype=torch.float64)
    weight = torch.randn(images.shape, dtype=torch.float64)

    def value(pixels: Tensor) -> Tensor:
        # G's part comes back as float32: the pieces are compared at a step that this allows.
        return (perceive(Shield(spec=SPEC, defense=defense), "full")(pixels) * weight).sum()

    (gradient,) = torch.autograd.grad(value(images), images)
    step = 2e-4
    with torch.no_grad():
        slope = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
    assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=0.02)


@torch.no_grad()
def test_omega_mixes_g_and_s(trained: dict[str, Tensor]) -> None:
    images = smooth(2, 16, 24)
    f, g = RawMapper(), SmallISP()
    f.load_state_dict({n[2:]: t for n, t in trained.items() if n.startswith("f.")})
    g.load_state_dict({n[2:]: t for n, t in trained.items() if n.startswith("g.")})
    raw = f(images)
    learned, conventional = g(raw), develop_raw(raw)
    assert not torch.allclose(learned, conventional, atol=0.01)
    assert torch.allclose(deployed(trained, omega=1.0).apply(images), learned, atol=1e-6)
    assert torch.allclose(deployed(trained, omega=0.0).apply(images), conventional, atol=1e-6)
    mixed = 0.7 * learned + 0.3 * conventional
    assert torch.allclose(deployed(trained).apply(images), mixed, atol=1e-6)


@torch.no_grad()
def test_under_autocast_it_stays_float32_and_close(trained: dict[str, Tensor]) -> None:
    defense, images = deployed(trained), smooth(2, 24, 24)
    exact = defense.apply(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = defense.apply(images)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert float((rough - exact).abs().max()) < 0.03


def test_weights_of_another_network_are_refused() -> None:
    for learned, g in ((weights(), "pynet"), ({}, "small"), ({"delta": torch.zeros(3)}, "small")):
        with pytest.raises(ValueError, match=f"these are no weights of raw_isp with g={g}"):
            deployed(learned, g=g)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"omega": 1.2}, "omega=1.2 must lie between 0 and 1"),
        ({"omega": float("nan")}, "omega=nan must"),
        ({"through_f": -0.1}, "through_f=-0.1 must"),
        ({"patch": 24}, "patch=24 must be a multiple of 16, at least 16"),
        ({"patch": 0}, "patch=0 must be a multiple of 16"),
        ({"patch": 80, "g": "pynet"}, "patch=80 must be a multiple of 32"),
        ({"patch": 32, "g": "pynet"}, "patch=32 must be a multiple of 32, at least 64"),
        ({"f_steps": 0}, "f_steps, g_steps and batch must be at least 1"),
        ({"batch": 0}, "f_steps, g_steps and batch must be"),
        ({"rate": 0}, "rate=0.0 must be positive"),
        ({"rate": float("nan")}, "rate=nan must be positive"),
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^raw_isp: .*{message}"):
        SPEC.build(params)


# -- training


def make_job(images: Tensor, **params: Any) -> DefenseJob:
    defense = SPEC.build({**QUICK, **params})
    pool = Pool(source="toy", levels=(images * 255).round().to(torch.uint8), sha256="toy")
    ground = Ground(public=None, pool=pool, threat=ThreatModel(eps=0), seed=0, device=torch.device("cpu"))
    return DefenseJob(spec=SPEC, defense=defense, ground=ground)


def test_the_published_noise() -> None:
    """s z with z ~ N(0, 0.1) a pixel and s ~ N(0, 1) an image: 0.08 on average, 0.1 in the mean square."""
    noise = _noisy(torch.full((4000, 3, 8, 8), 0.01)) - 0.01
    sizes = noise.flatten(1).std(dim=1)
    assert float(sizes.mean()) == pytest.approx(0.1 * (2 / np.pi) ** 0.5, abs=0.003)
    assert float(sizes.square().mean().sqrt()) == pytest.approx(0.1, abs=0.004)
    assert float((noise < -0.01).float().mean()) > 0.3, "not clamped"
    shape = noise / sizes.view(-1, 1, 1, 1)
    assert float((shape[:, 0, 0, 0] * shape[:, 1, 4, 4]).mean().abs()) < 0.06, "a draw of its own for every pixel"


def test_the_sensor_s_noise_has_the_published_line() -> None:
    """ln shot ~ U(ln 1e-4, ln 0.012); ln read = 2.18 ln shot + 1.2 + N(0, 0.26); variance = signal * shot + read."""
    raw = torch.full((400, 4, 64, 64), BLACK)
    raw[:, :, 32:] += (1 - BLACK) * 0.5
    change = (_sensor_noise(raw) - raw) / (1 - BLACK)
    read, bright = change[:, :, :32].flatten(1).var(dim=1), change[:, :, 32:].flatten(1).var(dim=1)
    shot = ((bright - read) / 0.5).log()
    low, high = np.log(1e-4), np.log(0.012)
    assert float(shot.min()) > low - 0.1
    assert float(shot.max()) < high + 0.1
    assert float(shot.mean()) == pytest.approx((low + high) / 2, abs=0.25)
    assert float(shot.std()) == pytest.approx((high - low) / 12**0.5, abs=0.15)
    rest = read.log() - 2.18 * shot - 1.2
    assert float(rest.mean()) == pytest.approx(0, abs=0.06)
    assert float(rest.std()) == pytest.approx(0.26, abs=0.05)
    assert float(_sensor_noise(torch.zeros(50, 4, 8, 8)).min()) == 0


def test_psnr_is_the_formula() -> None:
    truth = torch.zeros(2, 3, 4, 4)
    images = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert float(psnr(images, truth)) == pytest.approx((20 + 40) / 2, abs=1e-3)


def test_a_few_steps_lower_both_losses() -> None:
    job = make_job(smooth(16, 32, 32), patch=32, f_steps=25, g_steps=25, batch=8, rate=3e-3)
    view = job.view(Meter())
    trainer = job.defense.trainer(view)
    index = torch.arange(8)
    seen: dict[str, list[float]] = {"f_loss": [], "g_loss": []}
    for number in range(trainer.steps):
        terms = trainer.step(number, index)
        for name, values in seen.items():
            if name in terms:
                values.append(float(terms[name]))
        assert {"psnr", "ssim"} <= set(terms)
    assert [len(values) for values in seen.values()] == [25, 25]
    for (name, values), share in zip(seen.items(), (0.6, 0.95), strict=True):
        assert sum(values[-5:]) < share * sum(values[:5]), name


def test_f_stands_still_while_g_learns() -> None:
    job = make_job(smooth(12, 16, 16))
    trainer = job.defense.trainer(job.view(Meter()))
    for number in range(3):
        trainer.step(number, torch.arange(2))
    after_f = {name: t.clone() for name, t in trainer.result().items()}
    for number in range(3, 6):
        trainer.step(number, torch.arange(2))
    for name, tensor in trainer.result().items():
        assert torch.equal(tensor, after_f[name]) == name.startswith("f."), name


class _KilledError(Exception):
    pass


class _Dies:
    """A trainer that is killed at one step."""

    def __init__(self, trainer: Trainer, at: int) -> None:
        self._trainer, self._at = trainer, at
        self.steps, self.batch = trainer.steps, trainer.batch
        self.state, self.restore, self.result = trainer.state, trainer.restore, trainer.result

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        if number == self._at:
            raise _KilledError("at a step")
        return self._trainer.step(number, index)


def train(job: DefenseJob, path: Path, die: int | None = None) -> Trained:
    meter = Meter()
    view = job.view(meter)

    def make() -> Trainer:
        trainer = job.defense.trainer(view)
        return trainer if die is None else _Dies(trainer, die)

    return run_training(
        make, pool=len(view.images), seed=view.seed, meter=meter, checkpoint=path, key=job.key(), every=0.0
    )


@pytest.mark.parametrize("real", [False, True], ids=["unprocessed", "pairs"])
def test_a_killed_and_resumed_training_equals_an_uninterrupted_one(real: bool, tmp_path: Path) -> None:
    params = {"pairs": str(write_pairs(tmp_path / "pairs"))} if real else {}
    job = make_job(smooth(12, 16, 16), **params)
    whole = train(job, tmp_path / "whole.safetensors")
    path = tmp_path / "part.safetensors"
    for at in (1, 3, 5):  # inside F, before G's first step, before the last
        with pytest.raises(_KilledError, match="at a step"):
            train(job, path, die=at)
    resumed = train(job, path)
    assert whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(whole.tensors[name], resumed.tensors[name]) for name in whole.tensors)
    assert whole.losses == resumed.losses


def test_what_is_learned_is_what_the_defence_takes(trained: dict[str, Tensor]) -> None:
    assert trained.keys() == weights().keys()
    assert all(tensor.isfinite().all() for tensor in trained.values())


def test_a_smallest_patch_trains_each_network() -> None:
    for g, patch in (("small", 16), ("pynet", 64)):
        job = make_job(smooth(3, patch, patch), g=g, patch=patch, f_steps=1, g_steps=1, batch=1)
        trainer = job.defense.trainer(job.view(Meter()))
        for number in range(2):
            terms = trainer.step(number, torch.tensor([0]))
        assert all(value.isfinite() for value in terms.values())


# -- real pairs


def write_pair(root: Path, name: str, *, height: int = 40, width: int = 48, raw_height: int | None = None) -> None:
    """A ramp from left to right, as a mosaic of 16-bit values out of 1020 and as a photograph."""
    ramp = np.linspace(0.1, 0.9, width)
    plane = np.rint(np.broadcast_to(ramp * 1020, (raw_height or height, width))).astype(np.uint16)
    photo = np.rint(np.broadcast_to(ramp[None, :, None] * 255, (height, width, 3))).astype(np.uint8)
    for folder in ("huawei_raw", "canon"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(plane).save(root / "huawei_raw" / f"{name}.png")
    PIL.Image.fromarray(photo).save(root / "canon" / f"{name}.jpg", quality=100, subsampling=0)


def write_pairs(root: Path) -> Path:
    for name in ("1", "10", "2"):
        write_pair(root, name)
    return root


def test_crops_of_a_pair_show_the_same_place(tmp_path: Path) -> None:
    pairs = Pairs(str(write_pairs(tmp_path)), side=8)
    assert len(pairs) == 3
    batch = pairs.batch(20, torch.Generator().manual_seed(0))
    assert batch.raw.shape == (20, 4, 8, 8)
    assert batch.rgb.shape == (20, 3, 8, 8)
    assert torch.allclose(batch.raw.mean(dim=1), batch.rgb.mean(dim=1), atol=0.02)
    assert len({round(float(crop[0, 0, 0]), 2) for crop in batch.rgb}) > 5, "of places of their own"


def test_a_mosaic_of_odd_size_loses_its_last_row(tmp_path: Path) -> None:
    write_pair(tmp_path, "odd", height=41, width=47)
    batch = Pairs(str(tmp_path), side=20).batch(4, torch.Generator().manual_seed(0))
    assert torch.allclose(batch.raw.mean(dim=1), batch.rgb.mean(dim=1), atol=0.02)


def test_files_of_a_pair_are_told_by_their_names(tmp_path: Path) -> None:
    for name in ("a", "a.k", "a-b", "a b"):
        write_pair(tmp_path, name)
    files = pair_files(str(tmp_path))
    assert [path.stem for path in files[:4]] == [path.stem for path in files[4:]]
    assert {path.suffix for path in files[:4]} == {".png"}
    assert pair_files("") == ()


def test_what_is_no_folder_of_pairs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pairs=.*: there is no huawei_raw/NAME.png with its canon/NAME.jpg"):
        pair_files(str(tmp_path))
    write_pairs(tmp_path)
    (tmp_path / "canon" / "10.jpg").unlink()
    with pytest.raises(ValueError, match=r"pairs=.*: 10 has no counterpart \(1 such of 3\)"):
        pair_files(str(tmp_path))


def test_pairs_that_are_none_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", "low", raw_height=20)
    with pytest.raises(ValueError, match=r"low.png \(20, 48\) and .*low.jpg \(40, 48\) are no pair"):
        Pairs(str(tmp_path / "a"), side=8).batch(1, torch.Generator())
    write_pair(tmp_path / "b", "small", height=14)
    with pytest.raises(ValueError, match=r"small.png is smaller than a crop of 16 pixels"):
        Pairs(str(tmp_path / "b"), side=8).batch(1, torch.Generator())


def test_pairs_that_are_not_there_are_the_user_s_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    request = FitRequest(
        plugin="raw_isp",
        encoder=None,
        threat=ThreatModel(eps=0),
        out=tmp_path / "a.safetensors",
        params={**{k: v for k, v in QUICK.items() if k != "artifact"}, "pairs": str(tmp_path / "nowhere")},
        surrogate="fractal:classes=2,train=4,test=1,size=32",
        samples=8,
        device="cpu",
    )
    with pytest.raises(UsageError, match="there is no huawei_raw"):
        fit_plugin(request, registry())


def test_rbx_fit_trains_it_for_every_encoder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))
    rbx = Command(capsys, monkeypatch, tmp_path)
    quick = [part for k, v in QUICK.items() if k != "artifact" for part in ("-p", f"{k}={v}")]
    shared = ("--surrogate", "fractal:classes=2,train=4,test=1,size=32", "--samples", "8", "--device", "cpu")
    ended = rbx("fit", "raw_isp", *shared, *quick, "--out", "a.safetensors")
    assert ended.code == 0, ended.err
    made = read_artifact(Path("a.safetensors"))
    assert (made.provenance.plugin, made.provenance.encoder, made.provenance.steps) == ("raw_isp", "none", 6)
    assert made.provenance.params["patch"] == 16
    defense = SPEC.build({"artifact": "a.safetensors"})
    assert find_defense(SPEC, defense, None).artifact.sha256 == made.sha256
    assert defense.armed(made.tensors).apply(torch.rand(1, 3, 16, 16)).isfinite().all()


def test_the_content_of_the_pairs_decides_the_key(tmp_path: Path) -> None:
    job = make_job(smooth(4, 16, 16), pairs=str(write_pairs(tmp_path)))
    before = job.key()
    assert before == make_job(smooth(4, 16, 16), pairs=str(tmp_path)).key()
    write_pair(tmp_path, "2", width=50)
    assert job.key() != before


# -- what is shipped


@needs_shipped
def test_the_shipped_weights_are_found_and_bring_a_photograph_back(photograph: Tensor) -> None:
    defense = SPEC.build({})
    found = find_defense(SPEC, defense, None)
    made = found.artifact.provenance
    assert found.origin == f"shipped artefact {SHIPPED.name}"
    assert (made.plugin, made.encoder, made.encoder_sha256) == ("raw_isp", "none", "")
    with torch.no_grad():
        back = defense.armed(found.artifact.tensors).apply(photograph)
    assert float(psnr(back, photograph)) > 20


@needs_shipped
@torch.no_grad()
def test_the_shipped_f_answers_as_the_camera_records(photograph: Tensor) -> None:
    learned = find_defense(SPEC, SPEC.build({}), None).artifact.tensors
    f = RawMapper()
    f.load_state_dict({n[2:]: t for n, t in learned.items() if n.startswith("f.")})
    raw = raw_from_rgb(photograph)
    assert float(F.mse_loss(f(F.avg_pool2d(photograph, 2)), raw)) < 0.2 * float(raw.var())


def test_patches_serve_the_training() -> None:
    """From photographs of any size to a trained pipeline, with no encoder anywhere."""
    pictures = [PIL.Image.fromarray(np.full((40, 30, 3), 60 * k, dtype=np.uint8)) for k in range(1, 4)]
    items = [Item(id=str(k), label=0, load=lambda p=p: p) for k, p in enumerate(pictures)]  # type: ignore[misc]
    pool = make_patches("toy", items, side=16, count=12, seed=0)
    ground = Ground(public=None, pool=pool, threat=ThreatModel(eps=0), seed=0, device=torch.device("cpu"))
    made = DefenseJob(spec=SPEC, defense=SPEC.build(QUICK), ground=ground).run(None)
    assert made.tensors.keys() == weights().keys()
    assert (made.provenance.encoder, made.provenance.input_size) == ("none", (16, 16))
    assert set(made.provenance.params) == set(SPEC.fitted_by or ())
