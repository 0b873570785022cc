"""Random crops and spectra against other implementations of the same."""

import math

import pytest
import scipy.fft
import torch
import torch.nn.functional as F

from robustbench_x.randomness import SampleRandom
from robustbench_x_attacks.aimed.transforms import cosine_basis, crop_boxes, crop_resized, spectral


def _images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_a_crop_is_torch_s_bilinear_resize_of_the_slice() -> None:
    images = _images(3, 20, 28)
    boxes = torch.tensor([[0, 0, 20, 28], [3, 5, 11, 17], [19, 27, 1, 1]])
    cropped = crop_resized(images, boxes)
    for image, box, result in zip(images, boxes.tolist(), cropped, strict=True):
        top, left, height, width = box
        piece = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(piece, (20, 28), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_a_crop_s_gradient_is_that_of_torch_s_resize() -> None:
    images = _images(1, 12, 12).double().requires_grad_(True)
    weight = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    (found,) = torch.autograd.grad((weight * crop_resized(images, torch.tensor([[2, 1, 7, 9]]))).sum(), images)
    resized = F.interpolate(images[..., 2:9, 1:10], (12, 12), mode="bilinear", align_corners=False)
    (expected,) = torch.autograd.grad((weight * resized).sum(), images)
    torch.testing.assert_close(found, expected)


def test_boxes_lie_inside_and_have_the_shares_and_ratios_asked_for() -> None:
    random = SampleRandom(list(range(2000)))
    top, left, height, width = crop_boxes(random, (60, 80), (0.5, 0.9)).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 60).all()
    assert (left + width <= 80).all()
    share = height * width / 4800
    ratio = width / height
    assert 0.48 < float(share.min()) < 0.55
    assert 0.8 < float(share.max()) < 0.92
    assert 0.72 < float(ratio.min()) < 0.8
    assert 1.25 < float(ratio.max()) < 1.37
    assert top.unique().numel() > 10
    assert (top + height == 60).any(), "the last row can be reached"


def test_boxes_where_none_fits_are_the_middle() -> None:
    boxes = crop_boxes(SampleRandom([0, 1]), (30, 300), (1.0, 1.0))
    assert boxes.tolist() == [[0, 130, 30, 40]] * 2
    square = crop_boxes(SampleRandom(list(range(50))), (30, 30), (1.0, 1.0))
    assert ((square[:, 2] >= 29) & (square[:, 3] >= 29)).all()


def test_boxes_depend_on_the_sample_alone() -> None:
    whole = crop_boxes(SampleRandom([5, 6, 7]), (60, 80), (0.5, 0.9))
    part = crop_boxes(SampleRandom([5, 6, 7]), (60, 80), (0.5, 0.9), torch.tensor([2]))
    assert torch.equal(part[0], whole[2])


@pytest.mark.parametrize("size", [(8, 8), (7, 12)])
def test_a_spectrum_is_scipy_s_orthonormal_cosine_transform(size: tuple[int, int]) -> None:
    images = 0.3 + 0.4 * _images(2, *size)
    noise, mask = 0.01 * _images(2, *size), 0.9 + 0.2 * _images(2, *size)
    spectrum = scipy.fft.dctn((images + noise).double().numpy(), axes=(2, 3), norm="ortho") * mask.double().numpy()
    expected = torch.from_numpy(scipy.fft.idctn(spectrum, axes=(2, 3), norm="ortho")).float()
    torch.testing.assert_close(spectral(images, noise, mask), expected.clamp(0, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(spectral(images, 0 * noise, torch.ones_like(mask)), images, rtol=0, atol=1e-5)


def test_the_basis_is_orthonormal_and_starts_with_the_mean() -> None:
    basis = cosine_basis(9)
    torch.testing.assert_close(basis @ basis.T, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(basis[0], torch.full((9,), 1 / math.sqrt(9), dtype=torch.float64))


def test_a_spectral_sample_is_a_valid_image() -> None:
    made = spectral(_images(2, 8, 8), torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 3.0))
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1
