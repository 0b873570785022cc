"""`timm:NAME` and `timm:NAME@FILE`: complete checkpoints load, anything else is refused with its reason."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import LoadedEncoder, state_sha256
from robustbench_x.encoders.source import EncoderOptions
from robustbench_x.encoders.timm_source import SOURCE
from robustbench_x.errors import ConfigError, SourceError

_SMALL = "vit_tiny_patch16_224"


def _model(name: str = _SMALL, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model.eval()


def _load(rest: str, **options: int | bool) -> LoadedEncoder:
    return SOURCE.load(f"timm:{rest}", rest, EncoderOptions(**options))  # type: ignore[arg-type]


def _saved(path: Path, state: dict[str, Tensor]) -> str:
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return f"{_SMALL}@{path}"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return _model().state_dict()


@torch.no_grad()
def test_a_checkpoint_loads_with_its_classifier_and_digest(tmp_path: Path, state: dict[str, Tensor]) -> None:
    rest = _saved(tmp_path / "w.safetensors", state)
    encoder, classifier, _ = _load(rest)
    assert encoder.sha256 == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert encoder.source == f"timm:{rest}"
    assert encoder.license == ""
    assert classifier is not None
    images = torch.rand(1, 3, 224, 224)
    expected = _model()((images - encoder.mean) / encoder.std)
    torch.testing.assert_close(classifier(encoder(images)), expected, rtol=1e-4, atol=1e-5)


def test_a_size_keeps_the_digest_of_the_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    rest = _saved(tmp_path / "w.safetensors", state)
    small, full = _load(rest, size=64).encoder, _load(rest).encoder
    assert small.input_size == (64, 64)
    assert small.sha256 == full.sha256


def test_a_wrapped_and_prefixed_checkpoint_loads_and_says_so(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"epoch": 1, "state_dict": {f"module.{key}": t for key, t in state.items()}}, tmp_path / "w.pth")
    encoder, classifier, _ = _load(f"{_SMALL}@{tmp_path / 'w.pth'}")
    assert classifier is not None
    assert encoder.notes == (
        "the weights are the part 'state_dict' of w.pth",
        "the prefix 'module.' was stripped from every key",
    )


def test_a_headless_checkpoint_has_no_classifier(tmp_path: Path, state: dict[str, Tensor]) -> None:
    body = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    encoder, classifier, _ = _load(_saved(tmp_path / "w.safetensors", body))
    assert classifier is None
    assert encoder.notes == ("the checkpoint holds no classifier",)


def test_half_a_classifier_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    half = {key: tensor for key, tensor in state.items() if key != "head.bias"}
    with pytest.raises(SourceError, match=r"1 missing: head\.bias"):
        _load(_saved(tmp_path / "w.safetensors", half))
    other = {key: tensor for key, tensor in state.items() if key != "head.weight"}
    with pytest.raises(SourceError, match=r"1 missing: head\.weight"):
        _load(_saved(tmp_path / "v.safetensors", other))


def test_a_fine_tuned_head_sets_the_number_of_classes(tmp_path: Path) -> None:
    rest = _saved(tmp_path / "w.safetensors", _model(num_classes=10).state_dict())
    classifier = _load(rest).classifier
    assert classifier is not None
    assert classifier.num_classes == 10
    assert classifier.aliases == {str(i): i for i in range(10)}


def test_the_original_release_loads_through_timms_own_rule(tmp_path: Path) -> None:
    # The DINOv2 authors' files carry a mask token, which timm drops.
    torch.manual_seed(0)
    name = "vit_small_patch14_dinov2"
    original = timm.create_model(name, pretrained=False).state_dict()
    original["mask_token"] = torch.zeros(1, 384)
    torch.save(original, tmp_path / "dinov2.pth")
    encoder, classifier, _ = _load(f"{name}@{tmp_path / 'dinov2.pth'}", size=28)
    assert classifier is None
    assert any("original release" in note for note in encoder.notes)


def test_missing_keys_are_listed(tmp_path: Path, state: dict[str, Tensor]) -> None:
    cut = {key: tensor for key, tensor in state.items() if not key.startswith(("blocks.11", "norm"))}
    with pytest.raises(SourceError, match=r"14 missing: blocks\.11\.norm1\.weight, .*, \.\.\.$"):
        _load(_saved(tmp_path / "w.safetensors", cut))


def test_renamed_keys_are_listed_on_both_sides(tmp_path: Path, state: dict[str, Tensor]) -> None:
    renamed = dict(state)
    renamed["final.weight"] = renamed.pop("norm.weight")
    with pytest.raises(SourceError, match=r"1 missing: norm\.weight; 1 unexpected: final\.weight"):
        _load(_saved(tmp_path / "w.safetensors", renamed))


def test_extra_keys_are_listed(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(SourceError, match=r"1 unexpected: decoder\.weight"):
        _load(_saved(tmp_path / "w.safetensors", {**state, "decoder.weight": torch.ones(2)}))


def test_another_architecture_is_refused_by_shape(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(_model("vit_small_patch16_224").state_dict(), path)
    with pytest.raises(SourceError, match=r"wrongly shaped: cls_token \(1, 1, 384\) instead of \(1, 1, 192\)"):
        _load(f"{_SMALL}@{path}")


def test_an_unknown_name_lists_near_matches() -> None:
    with pytest.raises(SourceError, match="timm has no model 'resnet51'; did you mean resnet"):
        _load("resnet51")
    with pytest.raises(SourceError, match=r"timm knows no weights 'dinov9' of resnet18; it knows .*resnet18\.a1_in1k"):
        _load("resnet18.dinov9")
    with pytest.raises(ConfigError, match="write the checkpoint after '@'"):
        _load("resnet18@")


def test_an_architecture_nobody_trained_is_refused() -> None:
    with pytest.raises(SourceError, match="nobody publishes weights of efficientnet_b6; load your own with"):
        _load("efficientnet_b6")


@pytest.mark.parametrize("name", ["resnet18", "vit_small_patch14_dinov2.lvd142m"])
def test_without_a_network_one_sentence_offers_what_works(tmp_path: Path, name: str) -> None:
    # In a process of its own: the hub reads its environment once, at import.
    code = (
        "import sys\n"
        "from robustbench_x.encoders.source import EncoderOptions\n"
        "from robustbench_x.encoders.timm_source import SOURCE\n"
        "from robustbench_x.errors import SourceError\n"
        f"try:\n    SOURCE.load('timm:{name}', '{name}', EncoderOptions())\n"
        "except SourceError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"timm:{name} needs a network that is not there; packaged:efficientnet_lite0 and packaged:dinov2_vits14 "
        f"need none, and timm:{name}@FILE loads a checkpoint you have\n"
    )


def test_weights_in_the_hubs_cache_need_no_network(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--timm--test_vit.r160_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(_model("test_vit").state_dict(), snapshot / "model.safetensors")
    code = (
        "from robustbench_x.encoders.source import EncoderOptions\n"
        "from robustbench_x.encoders.timm_source import SOURCE\n"
        "encoder, classifier, _ = SOURCE.load('timm:test_vit', 'test_vit', EncoderOptions())\n"
        "print(encoder.sha256, encoder.license, encoder.input_size, classifier.num_classes)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    digest = hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    assert done.stdout == f"{digest} apache-2.0 (160, 160) 1000\n"


def test_a_state_digest_knows_names_shapes_and_bytes_and_nothing_else() -> None:
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(1)}
    reordered = {"a": torch.tensor(1), "b": torch.arange(6.0).view(3, 2).T.contiguous().T.reshape(2, 3)}
    assert state_sha256(state) == state_sha256(reordered)
    assert state_sha256(state) != state_sha256({**state, "b": state["b"].view(3, 2)})
    assert state_sha256(state) != state_sha256({**state, "b": state["b"] + 1e-6})
    assert state_sha256(state) != state_sha256({"c": state["b"], "a": state["a"]})
