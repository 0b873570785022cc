"""The order of our mosaics against two other people's demosaicing: colour-demosaicing and demosaicnet."""

import importlib
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from kornia.color import CFA, raw_to_rgb
from torch import Tensor

from robustbench_x_defenses.raw_isp.bayer import mosaic, pack, unpack


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """A piece of a photograph, `(1, 3, 96, 128)` in [0, 1]."""
    piece = skimage.data.astronaut()[30:126, 160:288]
    return torch.from_numpy(piece.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def colour() -> Any:
    """colour-demosaicing, which warns on import that it cannot plot, and puts dummies in the place of matplotlib."""
    before = set(sys.modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("colour_demosaicing")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "matplotlib":
            del sys.modules[name]
    return module


@pytest.fixture(scope="module")
def learned() -> Any:
    """demosaicnet's network with the weights of its package, which it looks up through a module that is gone."""
    root = importlib.util.find_spec("demosaicnet").submodule_search_locations[0]  # type: ignore[union-attr,index]
    stub = types.ModuleType("pkg_resources")
    stub.resource_filename = lambda name, path: str(Path(root) / path)  # type: ignore[attr-defined]
    held = sys.modules.get("pkg_resources")
    sys.modules["pkg_resources"] = stub
    try:
        return importlib.import_module("demosaicnet.modules").BayerDemosaick(pad=True).eval()
    finally:
        if held is None:
            del sys.modules["pkg_resources"]
        else:
            sys.modules["pkg_resources"] = held


def _psnr(images: Tensor, truth: Tensor) -> float:
    inner = (..., slice(8, -8), slice(8, -8))
    return float(-10 * (images[inner] - truth[inner]).square().mean().log10())


def test_bilinear_demosaicing_is_colour_demosaicings(photo: Tensor, colour: Any) -> None:
    plane = mosaic(photo)
    ours = raw_to_rgb(plane, CFA.BG)[0].permute(1, 2, 0).numpy()
    theirs = colour.demosaicing_CFA_Bayer_bilinear(plane[0, 0].double().numpy(), "RGGB")
    np.testing.assert_allclose(ours[2:-2, 2:-2], theirs[2:-2, 2:-2], atol=1e-6)


def test_a_packed_mosaic_comes_back_in_their_order(photo: Tensor, colour: Any) -> None:
    plane = unpack(pack(mosaic(photo)))[0, 0].double().numpy()
    found = {}
    for order in ("RGGB", "BGGR"):
        made = colour.demosaicing_CFA_Bayer_Menon2007(plane, order)
        found[order] = _psnr(torch.from_numpy(np.clip(made, 0, 1)).permute(2, 0, 1)[None].float(), photo)
    assert found["RGGB"] > 30
    assert found["BGGR"] < 25


def test_a_learned_demosaicer_reads_our_order(photo: Tensor, learned: Any) -> None:
    """demosaicnet wants green first (G R / B G), which is RGGB in a mirror, and each colour in a plane of its own."""
    mirrored = photo.flip(-1)
    plane = mosaic(photo).flip(-1)
    masks = torch.zeros_like(mirrored)
    masks[:, 0, 0::2, 1::2] = masks[:, 2, 1::2, 0::2] = 1
    masks[:, 1, 0::2, 0::2] = masks[:, 1, 1::2, 1::2] = 1
    with torch.no_grad():
        theirs = learned(masks * plane).clamp(0, 1)
        turned = learned(masks.flip(-1) * plane.flip(-1)).clamp(0, 1)
    bilinear = raw_to_rgb(mosaic(photo), CFA.BG).flip(-1)
    assert _psnr(theirs, mirrored) > _psnr(bilinear, mirrored) + 3
    assert _psnr(turned, photo) < _psnr(bilinear, mirrored)
