"""`open_clip:` on a tiny random model: local checkpoints, folders in the hub's layout, and what is refused."""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.encoders.open_clip_source import SOURCE
from robustbench_x.encoders.source import EncoderOptions
from robustbench_x.errors import ConfigError, MissingExtraError, SourceError

_ARCH = "rbx-tiny"
_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{_ARCH}.json").write_text(json.dumps(_CONFIG))
    (folder / f"{_ARCH}-quickgelu.json").write_text(json.dumps({**_CONFIG, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    yield open_clip
    from open_clip.factory import _MODEL_CONFIG_PATHS, _rescan_model_configs

    _MODEL_CONFIG_PATHS.remove(folder)
    _rescan_model_configs()


@pytest.fixture(scope="module")
def model(open_clip: Any) -> Any:
    torch.manual_seed(0)
    return open_clip.create_model(_ARCH).eval()


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def _load(rest: str, **options: Any) -> LoadedEncoder:
    return SOURCE.load(f"open_clip:{rest}", rest, EncoderOptions(**options))


def test_both_sides_are_those_of_the_whole_model(open_clip: Any, model: Any, file: Path) -> None:
    encoder, classifier, text = _load(f"{_ARCH}@{file}")
    assert classifier is None
    assert text is not None
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    torch.testing.assert_close(encoder(images), model.encode_image((images - encoder.mean) / encoder.std))
    texts = ["a photo of a dog", "Two CATS!"]
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(_ARCH)(texts), normalize=True)
    torch.testing.assert_close(text(texts), expected)
    assert text.scale == pytest.approx(model.logit_scale.exp().item())
    assert encoder.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert encoder.num_parameters < sum(p.numel() for p in model.visual.parameters()) + 1
    encoder(images).sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.99


def test_layers_are_the_residual_blocks(open_clip: Any, model: Any, file: Path) -> None:
    encoder = _load(f"{_ARCH}@{file}").encoder
    assert encoder.layers == ("transformer.resblocks.0", "transformer.resblocks.1")
    images = torch.rand(2, 3, 32, 32)
    outputs: list[torch.Tensor] = []
    hook = model.visual.transformer.resblocks[1].register_forward_hook(lambda _m, _a, out: outputs.append(out))
    model.visual((images - encoder.mean) / encoder.std)
    hook.remove()
    names = [encoder.layers[1], encoder.parts[0]]
    found = encoder.tokens(images, names)
    prefix = found[names[0]].prefix
    assert prefix is not None
    torch.testing.assert_close(torch.cat([prefix, found[names[0]].spatial], dim=1), outputs[0])
    assert found[names[1]].spatial.shape == (2, 16, 32)


def test_quick_gelu_is_another_network_and_is_named(open_clip: Any, file: Path) -> None:
    images = torch.rand(1, 3, 32, 32)
    plain, quick = _load(f"{_ARCH}@{file}").encoder, _load(f"{_ARCH}-quickgelu@{file}").encoder
    assert (plain(images) - quick(images)).abs().max() > 1e-5
    assert plain.notes == (
        f"run without QuickGELU, since no file says how it was trained; {_ARCH}-quickgelu is the other way",
    )
    assert quick.notes == (f"run with QuickGELU, since no file says how it was trained; {_ARCH} is the other way",)


def test_another_size_resamples_the_positions(open_clip: Any, file: Path) -> None:
    encoder = _load(f"{_ARCH}@{file}", size=64).encoder
    assert encoder.input_size == (64, 64)
    assert encoder.tokens(torch.rand(1, 3, 64, 64), encoder.layers[:1])[encoder.layers[0]].spatial.shape[1] == 64
    with pytest.raises(ConfigError, match="size 50 is no multiple of the patch size 8; use 48 or 56"):
        _load(f"{_ARCH}@{file}", size=50)


def test_a_folder_in_the_hubs_layout(open_clip: Any, model: Any, tmp_path: Path) -> None:
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": _CONFIG, "preprocess_cfg": pixels}))
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "open_clip_model.safetensors")
    encoder = _load(f"hf-hub:{tmp_path}").encoder
    assert encoder.notes == ("the prefix 'module.' was stripped from every key",)
    seen = encoder.preprocessing
    assert (seen.mean, seen.std) == ((0.5,) * 3, (0.25,) * 3)
    assert (seen.interpolation, seen.crop_mode, seen.input_size) == ("bilinear", "squash", (32, 32))


def test_incomplete_and_pickled_files_are_refused(open_clip: Any, model: Any, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "visual.proj"}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(SourceError, match=r"1 missing: visual\.proj"):
        _load(f"{_ARCH}@{tmp_path / 'w.safetensors'}")
    torch.save({"state_dict": model}, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"w\.pt is a pickle that runs code while it loads .* --allow-pickle"):
        _load(f"{_ARCH}@{tmp_path / 'w.pt'}")
    assert _load(f"{_ARCH}@{tmp_path / 'w.pt'}", allow_pickle=True).encoder.feature_dim == 24


def test_names_are_checked_before_anything_is_downloaded(open_clip: Any) -> None:
    with pytest.raises(SourceError, match="open_clip has no model 'ViT-B-33'; did you mean ViT-B-32"):
        _load("ViT-B-33/openai")
    with pytest.raises(SourceError, match=r"open_clip knows no weights 'nope' of ViT-B-16; it knows openai,"):
        _load("ViT-B-16/nope")
    with pytest.raises(SourceError, match=f"it knows none; load your own with open_clip:{_ARCH}@FILE"):
        _load(f"{_ARCH}/nope")
    for rest in ("ViT-B-32", "ViT-B-32@", "ViT-B-32/"):
        with pytest.raises(ConfigError, match="write open_clip:ARCH/TAG or open_clip:ARCH@FILE"):
            _load(rest)


def test_offline_one_sentence_says_how_to_fetch(open_clip: Any) -> None:
    with pytest.raises(SourceError, match=r"^open_clip:ViT-B-32/openai needs a network .* hf download timm/"):
        _load("ViT-B-32/openai")
    with pytest.raises(SourceError, match=r"needs a network .* hf download chs20/fare2-clip"):
        _load("hf-hub:chs20/fare2-clip")


def test_published_weights_switch_quick_gelu_on(
    open_clip: Any, model: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustbench_x.encoders import open_clip_source

    published = {"hf_hub": "org/name/", "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _name: ["tag"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _name, _tag: published)
    monkeypatch.setattr(open_clip_source, "hub_file", lambda _source, _repository, _files: file)
    images = torch.rand(1, 3, 32, 32)
    encoder = _load(f"{_ARCH}/tag").encoder
    assert encoder.notes == ("the weights were trained with QuickGELU, so it was switched on",)
    assert encoder.preprocessing.mean == (0.5,) * 3
    quick = _load(f"{_ARCH}-quickgelu@{file}").encoder.backbone
    torch.testing.assert_close(encoder.backbone(images), quick(images))
    published["quick_gelu"] = False
    with pytest.raises(SourceError, match=f"trained without QuickGELU; use {_ARCH}/tag"):
        _load(f"{_ARCH}-quickgelu/tag")


def test_without_open_clip_the_pip_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"needs the package open_clip_torch: pip install .*\[vlm\]"):
        _load("ViT-B-32/openai")
