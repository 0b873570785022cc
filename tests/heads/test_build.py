"""From names to heads: features, caches, files, and every way a name can be wrong."""

import functools
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from robustbench_x import cache
from robustbench_x.data.dataset import Dataset, Item
from robustbench_x.encoders.encoder import Classifier, Encoder, LoadedEncoder, Preprocessing, Tokens
from robustbench_x.errors import ConfigError, DataError, SourceError, UnknownNameError
from robustbench_x.heads.base import FittedHead, HeadSpec
from robustbench_x.heads.build import build_head, features_of
from robustbench_x.heads.catalogue import HEADS
from robustbench_x.heads.saved import save_head
from robustbench_x.registry import Registry

CPU = torch.device("cpu")
CLASSES = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))


class _Averages(nn.Module):
    """Features: every channel averaged over 2 x 2 cells, times `gain`; counts the images it sees."""

    layers: tuple[str, ...] = ()

    def __init__(self, gain: float = 1.0, cells: int = 2) -> None:
        super().__init__()
        self.gain, self.cells, self.seen = gain, cells, 0

    def pooled(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return self.gain * nn.functional.adaptive_avg_pool2d(images, self.cells).flatten(1)

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        return []


def _encoder(backbone: _Averages | None = None, *, sha256: str = "a" * 64) -> Encoder:
    preprocessing = Preprocessing(input_size=(8, 8))
    return Encoder(source="toy", backbone=backbone or _Averages(), preprocessing=preprocessing, sha256=sha256)


def _picture(label: int, number: int) -> PIL.Image.Image:
    generator = torch.Generator().manual_seed(97 * number + label)
    pixels = torch.randint(0, 120, (8, 8, 3), generator=generator, dtype=torch.uint8)
    pixels[..., label] += 130
    return PIL.Image.fromarray(pixels.numpy())


def _unreadable(name: str) -> PIL.Image.Image:
    raise DataError(f"{name} is no image")


def _items(count: int = 12) -> tuple[Item, ...]:
    return tuple(Item(id=f"{i}", label=i % 3, load=functools.partial(_picture, i % 3, i)) for i in range(count))


def _broken(name: str, label: int = 0) -> Item:
    return Item(id=name, label=label, load=functools.partial(_unreadable, name))


def _dataset(train: tuple[Item, ...] | None = None) -> Dataset:
    items = _items()
    return Dataset(source="toy:colours", classes=CLASSES, train=items if train is None else train, test=items)


def _registry(*more: HeadSpec) -> Registry:
    registry = Registry()
    for spec in (*HEADS, *more):
        registry.add_head(spec)
    return registry


def _build(
    name: str,
    encoder: Encoder | None = None,
    *,
    dataset: Dataset | None = None,
    classifier: Classifier | None = None,
    registry: Registry | None = None,
    seed: int = 0,
) -> FittedHead:
    return build_head(
        name,
        loaded=LoadedEncoder(encoder or _encoder(), classifier),
        dataset=dataset or _dataset(),
        registry=registry or _registry(),
        seed=seed,
        device=CPU,
        batch_size=5,
    )


def test_features_are_the_encoders_in_the_order_of_the_items() -> None:
    encoder, items, told = _encoder(), _items(7), []
    found = features_of(encoder, items, batch_size=3, device=CPU, progress=lambda done, of: told.append((done, of)))
    expected = encoder(torch.stack([encoder.preprocessing(item.load()) for item in items]))
    torch.testing.assert_close(found.features, expected)
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert found.unreadable == ()
    assert told == [(7, 7)]


def test_features_come_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, items = _encoder(), (*_items(5), _broken("a.png"), *_items(4))
    whole = features_of(encoder, items, batch_size=3, device=CPU)
    monkeypatch.setattr("robustbench_x.heads.features._CHUNK", 2)
    parts = features_of(encoder, items, batch_size=3, device=CPU)
    assert torch.equal(whole.features, parts.features)
    assert torch.equal(whole.labels, parts.labels)
    assert parts.unreadable == ("a.png is no image",)


def test_no_items_are_no_features() -> None:
    found = features_of(_encoder(), (), batch_size=3, device=CPU)
    assert found.features.shape == (0, 12)
    assert found.labels.shape == (0,)


def _images_encoded(backbone: _Averages, items: Sequence[Item], *, sha256: str = "a" * 64) -> int:
    """How many images pass through the network, beside the two that fingerprint it."""
    encoder = _encoder(backbone, sha256=sha256)
    before = backbone.seen
    features_of(encoder, items, batch_size=4, device=CPU)
    return backbone.seen - before - 2


def test_features_are_cached_by_content() -> None:
    items = _items(6)
    assert _images_encoded(_Averages(), items) == 6
    assert _images_encoded(_Averages(), items) == 0
    renamed = tuple(Item(id=f"x{item.id}", label=0, load=item.load) for item in items)
    assert _images_encoded(_Averages(), renamed) == 0
    assert _images_encoded(_Averages(), items[::-1]) == 6
    assert _images_encoded(_Averages(), items, sha256="b" * 64) == 6
    # A python: encoder with other code and the same weights.
    assert _images_encoded(_Averages(gain=2.0), items) == 6


def test_a_damaged_cache_is_rebuilt() -> None:
    expected = features_of(_encoder(), _items(6), batch_size=4, device=CPU).features
    (path,) = cache.cache_dir().rglob("features-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    assert _images_encoded(_Averages(), _items(6)) == 6
    assert torch.equal(features_of(_encoder(), _items(6), batch_size=4, device=CPU).features, expected)


@pytest.mark.parametrize("name", ["linear", "mlp", "knn", "prototype"])
def test_a_fitted_head_is_right_and_says_how_it_was_made(name: str) -> None:
    encoder = _encoder()
    head = _build(name, encoder)
    images = torch.stack([encoder.preprocessing(item.load()) for item in _items()])
    assert torch.equal(head(encoder(images)).argmax(dim=1), torch.arange(12) % 3)
    assert head.match(CLASSES).tolist() == [0, 1, 2]
    made = head.settings
    assert (made["kind"], made["train_samples"], made["train_accuracy"]) == (name, 12, 1.0)
    assert (made["unreadable"], made["unreadable_first"]) == (0, [])
    assert (made["feature_dim"], made["encoder_sha256"]) == (12, "a" * 64)
    assert made["cache_key"].startswith("head-")
    assert {p.requires_grad for p in head.parameters()} <= {False}


@pytest.mark.parametrize("name", ["linear", "mlp", "knn", "prototype"])
def test_a_head_from_the_cache_is_the_same_head(name: str) -> None:
    probe = torch.rand(5, 12, generator=torch.Generator().manual_seed(1))
    fresh, again = _build(name), _build(name)
    assert torch.equal(fresh(probe), again(probe))
    assert fresh.settings == again.settings
    assert len(list(cache.cache_dir().rglob("head-*.safetensors"))) == 1


def test_another_seed_labels_or_features_are_another_head() -> None:
    relabelled = tuple(Item(id=i.id, label=(i.label + 1) % 3, load=i.load) for i in _items())
    heads = [
        _build("mlp"),
        _build("mlp", seed=1),
        _build("mlp", dataset=_dataset(relabelled)),
        _build("mlp", _encoder(_Averages(gain=2.0))),
    ]
    assert len({head.settings["cache_key"] for head in heads}) == 4


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    _build("mlp")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_unreadable_training_images_are_counted_and_named() -> None:
    train = (*_items(), *(_broken(f"{i}.png") for i in range(7)))
    made = _build("prototype", dataset=_dataset(train)).settings
    assert made["train_samples"] == 12
    assert made["unreadable"] == 7
    assert made["unreadable_first"] == [f"{i}.png is no image" for i in range(5)]


def test_no_readable_training_image_is_an_error() -> None:
    with pytest.raises(DataError, match="none of 2 training images is readable: a is no image; b is no image"):
        _build("linear", dataset=_dataset((_broken("a"), _broken("b"))))


def test_a_class_without_readable_images_is_an_error() -> None:
    train = (*(item for item in _items() if item.label != 1), _broken("a", label=1))
    with pytest.raises(DataError, match="head knn on toy:colours: class index 1 has no training sample"):
        _build("knn", dataset=_dataset(train))


def test_no_training_split_is_an_error_that_suggests_native() -> None:
    with pytest.raises(DataError, match="toy:colours has none; use head native"):
        _build("linear", dataset=_dataset(()))


def test_features_that_are_not_finite_stop_the_fit() -> None:
    backbone = _Averages()
    encoder = _encoder(backbone)
    backbone.gain = float("nan")
    with pytest.raises(DataError, match="12 of 12 training images have NaN or infinite features"):
        _build("linear", encoder)


def test_native_is_the_published_classifier() -> None:
    layer = nn.Linear(12, 4)
    named = _build("native", classifier=Classifier(layer, num_classes=4, aliases={"red": 3, "n01": 3, "blue": 0}))
    assert named.match(["blue", "red"]).tolist() == [0, 3]
    probe = torch.rand(2, 12)
    assert torch.equal(named(probe), layer(probe))
    assert (named.name, named.num_classes) == ("native", 4)
    bare = _build("native", classifier=Classifier(layer, num_classes=4))
    assert bare.match(["3", "0"]).tolist() == [3, 0]


def test_native_without_a_classifier_suggests_linear() -> None:
    with pytest.raises(SourceError, match=r"toy publishes no classifier.*use head linear"):
        _build("native")


@pytest.mark.parametrize("name", ["file", "file:", "linear:x", "linear:", "native:x"])
def test_only_file_takes_a_path(name: str) -> None:
    with pytest.raises(ConfigError, match="only file takes a path"):
        _build(name)


def test_an_unknown_head_lists_near_matches() -> None:
    with pytest.raises(UnknownNameError, match="unknown head 'liner'; did you mean linear"):
        _build("liner")


def test_a_plugins_head_is_seeded_and_needs_no_restore() -> None:
    def fit(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> nn.Module:
        return nn.Linear(features.shape[1], num_classes)  # drawn from the global generator

    registry = _registry(HeadSpec(name="random", summary="draws", fit=fit), HeadSpec(name="empty", summary="nothing"))
    probe = torch.rand(3, 12)
    assert torch.equal(_build("random", registry=registry)(probe), _build("random", registry=registry)(probe))
    assert not list(cache.cache_dir().rglob("head-*.safetensors"))
    with pytest.raises(SourceError, match="head empty has nothing to fit"):
        _build("empty", registry=registry)


@pytest.mark.parametrize("name", ["linear", "mlp", "knn", "prototype"])
def test_a_saved_head_comes_back(name: str, tmp_path: Path) -> None:
    head, path = _build(name), tmp_path / "head.safetensors"
    save_head(head, path)
    again = _build(f"file:{path}")
    probe = torch.rand(5, 12)
    assert torch.equal(head(probe), again(probe))
    assert again.aliases == head.aliases
    assert again.name == f"file:{path}"
    assert {k: v for k, v in again.settings.items() if k != "file_sha256"} == head.settings
    save_head(again, tmp_path / "copy.safetensors")
    assert torch.equal(_build(f"file:{tmp_path / 'copy.safetensors'}")(probe), head(probe))
    assert sorted(p.name for p in tmp_path.glob("*.safetensors*")) == ["copy.safetensors", "head.safetensors"]


def test_a_head_of_another_encoder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_head(_build("prototype"), path)
    with pytest.raises(SourceError, match=f"sha256 {'a' * 64}, but toy has {'b' * 64}"):
        _build(f"file:{path}", _encoder(sha256="b" * 64))
    with pytest.raises(SourceError, match="reads features of dimension 12, but toy has 27"):
        _build(f"file:{path}", _encoder(_Averages(cells=3)))


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_head(_build("linear"), path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match="damaged, its content does not match its digest"):
        _build(f"file:{path}")
    path.write_bytes(content[:-9])
    with pytest.raises(SourceError, match="damaged or no safetensors file"):
        _build(f"file:{path}")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(SourceError, match="there is no file"):
        _build(f"file:{path}")
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(SourceError, match="is no head that robustbench_x saved"):
        _build(f"file:{path}")


def test_only_fitted_heads_are_saved_and_only_as_safetensors(tmp_path: Path) -> None:
    native = _build("native", classifier=Classifier(nn.Linear(12, 3), num_classes=3))
    with pytest.raises(SourceError, match="head native cannot be saved"):
        save_head(native, tmp_path / "head.safetensors")
    with pytest.raises(SourceError, match=r"saved as \.safetensors, not as head\.pt"):
        save_head(_build("prototype"), tmp_path / "head.pt")


def test_a_saved_head_whose_kind_cannot_be_restored_here(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_head(_build("prototype"), path)
    bare = Registry()
    bare.add_head(HeadSpec(name="file", summary="a saved head"))
    with pytest.raises(UnknownNameError, match="unknown head 'prototype'"):
        _build(f"file:{path}", registry=bare)
    bare.add_head(HeadSpec(name="prototype", summary="cannot be rebuilt"))
    with pytest.raises(SourceError, match="cannot be restored from a file"):
        _build(f"file:{path}", registry=bare)
