"""`hf:` encoders on tiny random models: what they compute, and what they refuse."""

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.encoders.hub_models import SOURCE
from robustbench_x.encoders.source import EncoderOptions, load_encoder
from robustbench_x.encoders.transformers_loading import read_preprocessing
from robustbench_x.errors import ConfigError, MissingExtraError, SourceError
from robustbench_x.registry import load_registry
from tiny_hub import save_tiny

_KINDS = ("clip", "siglip", "blip_itm")
_TEXTS = ["a photo of a dog", "the small red ship on the tree", "cat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in _KINDS}


def _load(folder: Path | str, *, size: int | None = None, allow_pickle: bool = False) -> LoadedEncoder:
    return SOURCE.load(f"hf:{folder}", str(folder), EncoderOptions(size=size, allow_pickle=allow_pickle))


def _copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("kind", _KINDS)
def test_both_sides_are_those_of_the_whole_model(kind: str, folders: dict[str, Path]) -> None:
    import transformers

    encoder, classifier, text = _load(folders[kind])
    assert classifier is None
    assert text is not None
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = (images - encoder.mean) / encoder.std
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    found = torch.nn.functional.normalize(encoder(images), dim=1) @ text(_TEXTS).T
    padded = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
    tokens = tokenizer(_TEXTS, return_tensors="pt", **padded)
    with torch.no_grad():
        if kind == "blip_itm":
            model = transformers.BlipForImageTextRetrieval.from_pretrained(folders[kind])
            expected = model(**tokens, pixel_values=pixels, use_itm_head=False).itm_score
        elif kind == "clip":
            model = transformers.CLIPModel.from_pretrained(folders[kind])
            expected = model(**tokens, pixel_values=pixels).logits_per_image / model.logit_scale.exp()
            assert text.scale == pytest.approx(model.logit_scale.exp().item())
        else:
            model = transformers.SiglipModel.from_pretrained(folders[kind])
            outputs = model(input_ids=tokens["input_ids"], pixel_values=pixels)
            expected = (outputs.logits_per_image - model.logit_bias) / model.logit_scale.exp()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", _KINDS)
def test_gradients_layers_and_parts(kind: str, folders: dict[str, Path]) -> None:
    encoder = _load(folders[kind]).encoder
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    tokens = encoder.tokens(images, [*encoder.layers, *encoder.parts])
    assert len(encoder.layers) == 2
    assert len(encoder.parts) == 4
    for found in tokens.values():
        assert found.spatial.shape == (2, 16, 32)
        assert (found.prefix is None) == (kind == "siglip")
    (encoder(images).sum() + tokens[encoder.layers[0]].spatial.sum()).backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.99


def test_a_copy_runs_on_its_own_weights(folders: dict[str, Path]) -> None:
    # Hardening fine-tunes a deep copy of the backbone.
    backbone = _load(folders["clip"]).encoder.backbone
    images = torch.rand(1, 3, 32, 32)
    before = backbone(images)
    copied = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(backbone(images), before)
    assert copied(images).abs().max() == 0


def test_the_digest_is_that_of_the_weight_file(folders: dict[str, Path]) -> None:
    encoder, _, text = _load(folders["clip"])
    assert encoder.sha256 == hashlib.sha256((folders["clip"] / "model.safetensors").read_bytes()).hexdigest()
    assert text is not None
    assert text.sha256 != encoder.sha256


def test_another_size_resamples_the_positions(folders: dict[str, Path]) -> None:
    encoder = _load(folders["clip"], size=64).encoder
    assert encoder.input_size == (64, 64)
    assert encoder.notes == ("position embeddings were resampled to the size asked for",)
    assert encoder.tokens(torch.rand(1, 3, 64, 64), encoder.layers[:1])[encoder.layers[0]].spatial.shape[1] == 64
    with pytest.raises(ConfigError, match="size 50 is no multiple of the patch size 8; use 48 or 56"):
        _load(folders["clip"], size=50)


@pytest.mark.parametrize("kind", _KINDS)
def test_pixels_are_those_of_the_image_processor(kind: str, folders: dict[str, Path]) -> None:
    import transformers

    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(levels)
    processor = (
        transformers.CLIPImageProcessor if kind == "clip" else transformers.BlipImageProcessor
    ).from_pretrained(folders[kind])
    encoder = _load(folders[kind]).encoder
    found = (encoder.preprocessing(image)[None] - encoder.mean) / encoder.std
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_photograph_is_resized_as_the_image_processor_does(tmp_path: Path) -> None:
    import transformers

    ramp = np.linspace(0, 255, 90 * 60 * 3).reshape(60, 90, 3).astype(np.uint8)
    image = PIL.Image.fromarray(ramp)
    for processor in (
        transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        transformers.BlipImageProcessor(size={"height": 32, "width": 32}),
    ):
        processor.save_pretrained(tmp_path)
        preprocessing = read_preprocessing(tmp_path, "hf:x")
        expected = torch.as_tensor(processor(image, return_tensors="pt", do_normalize=False)["pixel_values"][0])
        assert preprocessing.input_size == (32, 32)
        assert (preprocessing(image) - expected).abs().max() <= 2 / 255


def test_old_and_new_processor_files_mean_the_same(tmp_path: Path) -> None:
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "resample": 2}
    old = {**settings, "size": 36, "crop_size": 32, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    first = read_preprocessing(tmp_path, "hf:x")
    assert (first.input_size, first.crop_mode, first.interpolation) == ((32, 32), "center", "bilinear")
    assert first.crop_pct == pytest.approx(32 / 36)
    assert first.mean == (0.1, 0.2, 0.3)
    (tmp_path / "preprocessor_config.json").unlink()
    new = {**settings, "size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": new}))
    assert read_preprocessing(tmp_path, "hf:x") == first
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**new, "rescale_factor": 1.0}}))
    with pytest.raises(SourceError, match=r"does not scale pixels to \[0, 1\]"):
        read_preprocessing(tmp_path, "hf:x")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**new, "do_pad": True}}))
    with pytest.raises(SourceError, match="pads images"):
        read_preprocessing(tmp_path, "hf:x")
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(SourceError, match="describes no image processor"):
        read_preprocessing(tmp_path, "hf:x")


def test_missing_extra_and_damaged_weights_are_listed(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _copied(folders["clip"], tmp_path / "m")
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    without = {key: tensor for key, tensor in state.items() if key != "visual_projection.weight"}
    safetensors.torch.save_file(without, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"not loaded; 1 missing: visual_projection\.weight"):
        _load(folder)
    safetensors.torch.save_file({**state, "other.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"1 unexpected: other\.weight"):
        _load(folder)
    shaped = {**state, "visual_projection.weight": torch.ones(3, 3)}
    safetensors.torch.save_file(shaped, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"CLIPModel could not be loaded|wrongly shaped: visual_projection\.weight"):
        _load(folder)
    broken = {**state, "visual_projection.weight": torch.full((24, 32), float("nan"))}
    safetensors.torch.save_file(broken, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"1 not finite: visual_projection\.weight"):
        _load(folder)
    path.write_bytes(b"not safetensors")
    with pytest.raises(SourceError, match="CLIPModel could not be loaded"):
        _load(folder)
    path.unlink()
    with pytest.raises(SourceError, match=r"holds no weights \(model\.safetensors\)"):
        _load(folder)


def test_pickles_need_permission(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _copied(folders["clip"], tmp_path / "m")
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"weights are pickles \(pytorch_model\.bin\).*pass --allow-pickle"):
        _load(folder)
    images = torch.rand(1, 3, 32, 32)
    found = _load(folder, allow_pickle=True).encoder(images)
    torch.testing.assert_close(found, _load(folders["clip"]).encoder(images))


def test_other_models_and_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _copied(folders["clip"], tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(SourceError, match="is a GPT2LMHeadModel; image-text encoders are BlipForImageTextRetrieval,"):
        _load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"config\.json names no model_type"):
        _load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"has no config\.json"):
        _load(folder)
    with pytest.raises(SourceError, match="there is no folder /nowhere"):
        _load("/nowhere")
    with pytest.raises(SourceError, match="'a/b/c' is neither a folder nor a model's name on the hub"):
        _load("a/b/c")


def test_offline_one_sentence_says_how_to_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SourceError,
        match=r"^hf:openai/clip-vit-base-patch32 needs a network .* hf download openai/clip-vit-base-patch32",
    ):
        load_encoder("hf:openai/clip-vit-base-patch32", load_registry())


def test_without_transformers_the_pip_command_is_given(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"needs the package transformers: pip install .*\[vlm\]"):
        _load(folders["clip"])


@pytest.mark.slow
def test_the_registry_imports_neither_library() -> None:
    code = (
        "import sys; from robustbench_x.registry import load_registry as load; names = list(load().encoders); "
        "print({'hf', 'open_clip'} <= set(names), [m for m in ('transformers', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"
