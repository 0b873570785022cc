"""Tuned victims: what each scheme changes, what it leaves alone, how it is trained, cached, stored."""

import dataclasses
import functools
import itertools
import math
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from project import TINY, patterns
from robustbench_x import cache
from robustbench_x.data.dataset import Dataset, Item
from robustbench_x.encoders.encoder import Encoder, LoadedEncoder, Preprocessing, Tokens, state_sha256
from robustbench_x.encoders.source import load_encoder
from robustbench_x.encoders.timm_source import encoder_from_timm
from robustbench_x.errors import DataError, MissingExtraError, SampleError, SourceError
from robustbench_x.heads import linear
from robustbench_x.heads._training import hold_out
from robustbench_x.heads.base import FittedHead
from robustbench_x.heads.build import build_head
from robustbench_x.heads.catalogue import HEADS, tuned
from robustbench_x.heads.features import Features, features_of
from robustbench_x.heads.saved import save_head
from robustbench_x.heads.tuning.adapter import Adapted, adapter
from robustbench_x.heads.tuning.full import full
from robustbench_x.heads.tuning.lora import lora, targets_of
from robustbench_x.heads.tuning.overlay import copied, overlay_of, rebuild
from robustbench_x.heads.tuning.recipe import Lesson, Recipe, predictions, share_of_rate, train
from robustbench_x.heads.tuning.scheme import Scheme
from robustbench_x.heads.tuning.tune import Tuned, tune
from robustbench_x.registry import Registry, load_registry

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat", "dog")
SCHEMES = ("full", "lora", "adapter")
QUICK = Recipe(encoder_rate=3e-3, epochs=4, batch=8)
RATES = {("adapter", "conv"): 1e-2, ("adapter", "vit"): 1e-3}
"""Where the rate of QUICK is not what a random toy network learns at."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))


def _scheme(name: str, recipe: Recipe = QUICK) -> Scheme:
    if name == "lora":
        return lora(recipe=recipe)
    return full(recipe) if name == "full" else adapter(recipe=recipe)


@functools.cache
def _encoder(kind: str = "conv") -> Encoder:
    """`conv`: two convolutions with batch norm (NCHW); `vit`: tokens with a class token; `swin`: NHWC."""
    if kind == "conv":
        return load_encoder(TINY, load_registry()).encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "vit":
            options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
            name = "vit_tiny_patch16_224"
        else:
            options = {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
            name = "swin_tiny_patch4_window7_224"
        return encoder_from_timm(f"timm:{name}", timm.create_model(name, pretrained=False, **options)).encoder


def _levels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures of four patterns, too noisy for the probe to be perfect."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    images = 0.5 + 0.03 * patterns()[labels] + 0.12 * torch.randn((count, 3, 32, 32), generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


def _pixels(levels: Tensor) -> Tensor:
    return levels.float().div(255)


@torch.no_grad()
def _found(encoder: Encoder, count: int = 160, seed: int = 0) -> Features:
    levels, labels = _levels(count, seed)
    return Features(encoder(_pixels(levels)), labels, (), levels)


def _tune(scheme: Scheme, encoder: Encoder, found: Features | None = None, seed: int = 0) -> Tuned:
    found = found or _found(encoder)
    return tune(
        scheme,
        encoder,
        found,
        num_classes=len(CLASSES),
        seed=seed,
        device=CPU,
        batch_size=32,
        tell=lambda text: None,
    )


@functools.cache
def _made(name: str, kind: str = "conv") -> Tuned:
    rate = RATES.get((name, kind), QUICK.encoder_rate)
    return _tune(_scheme(name, dataclasses.replace(QUICK, encoder_rate=rate)), _encoder(kind))


def _victim(name: str, kind: str = "conv") -> tuple[Encoder, nn.Linear]:
    made = _made(name, kind)
    return rebuild(_scheme(name), _encoder(kind), made.overlay), linear.restore(made.classifier)


@torch.no_grad()
def _logits(encoder: Encoder, layer: nn.Module, levels: Tensor) -> Tensor:
    logits: Tensor = layer(encoder(_pixels(levels)))
    return logits


# --- what is learned


@pytest.mark.parametrize("kind", ["conv", "vit"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_tuned_victim_beats_its_probe_on_new_images_and_has_features_of_its_own(name: str, kind: str) -> None:
    made = _made(name, kind).settings
    assert made["encoder_rate"] == RATES.get((name, kind), 3e-3)
    assert made["held_out_loss"] < made["probe_held_out_loss"]
    assert made["feature_cosine"] < 0.9999
    encoder, layer = _victim(name, kind)
    levels, labels = _levels(80, seed=9)
    found = _found(_encoder(kind))
    probe = linear.fit(found.features, found.labels, len(CLASSES), 0)
    tuned_loss = F.cross_entropy(_logits(encoder, layer, levels), labels)
    assert tuned_loss < F.cross_entropy(_logits(_encoder(kind), probe, levels), labels)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_settings_are_those_of_the_victim(name: str) -> None:
    made, public = _made(name).settings, _encoder()
    encoder, layer = _victim(name)
    found = _found(public)
    keep, held_out = hold_out(found.labels, 0.1, torch.Generator().manual_seed(0))
    assert (made["trained_on"], made["held_out_samples"]) == (len(keep), len(held_out)) == (144, 16)
    assert (made["scheme"], made["optimizer"], made["batch"]) == (name, "AdamW", 8)
    assert made["encoder_rate"] == (1e-2 if name == "adapter" else 3e-3)
    assert (made["epochs"], made["patience"], made["held_out"]) == (4, 2, 0.1)
    assert 1 <= made["best_epoch"] <= made["epochs_run"] <= 4
    assert made["tuned_sha256"] == encoder.sha256 == state_sha256(encoder.backbone.state_dict()) != public.sha256
    assert made["changed_tensors"] == len(_made(name).overlay)
    assert (encoder.license, encoder.preprocessing) == (public.license, public.preprocessing)
    assert encoder.source == f"{TINY} ({name})"
    assert found.levels is not None
    hits = int((_logits(encoder, layer, found.levels).argmax(dim=1) == found.labels).sum())
    shares = (144 * made["train_accuracy"], 16 * made["held_out_accuracy"])
    assert hits == pytest.approx(sum(shares))
    assert made["device"].startswith("cpu")
    assert made["seconds"] > 0
    assert ("rank" in made, "reduction" in made, "peft" in made) == (name == "lora", name == "adapter", name == "lora")


def test_full_changes_every_weight_and_no_statistic() -> None:
    public = _encoder().backbone.state_dict()
    weights = {name for name, _ in _encoder().backbone.named_parameters()}
    assert set(_made("full").overlay) == weights
    assert set(public) > weights, "batch norm has statistics too"
    assert _made("full").settings["trainable_parameters"] == _encoder().num_parameters


@pytest.mark.parametrize("kind", ["conv", "vit"])
def test_lora_changes_the_matrices_it_targets_and_nothing_else(kind: str) -> None:
    targets = targets_of(_encoder(kind).backbone)
    matrices = {"vit": 9, "conv": 2}[kind]  # patch embedding, and qkv, proj, fc1, fc2 of two blocks
    assert set(_made("lora", kind).overlay) == {f"{name}.weight" for name in targets}
    assert len(targets) == _made("lora", kind).settings["targets"] == matrices
    public = _encoder(kind).backbone.state_dict()
    for name, tensor in _made("lora", kind).overlay.items():
        change = (tensor - public[name]).flatten(1)
        assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-4) <= 8 < min(public[name].flatten(1).shape)


@pytest.mark.parametrize("kind", ["conv", "vit", "swin"])
def test_an_adapter_adds_weights_and_changes_none(kind: str) -> None:
    overlay, public = _made("adapter", kind).overlay, _encoder(kind).backbone.state_dict()
    assert all(".down." in name or ".up." in name for name in overlay)
    assert len(overlay) == 4 * len(_encoder(kind).layers)
    encoder, _ = _victim("adapter", kind)
    inner = {n.replace(".inner", ""): t for n, t in encoder.backbone.state_dict().items() if n not in overlay}
    assert inner.keys() == public.keys()
    assert all(torch.equal(inner[name], public[name]) for name in public)


@pytest.mark.parametrize("kind", ["conv", "vit"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_public_encoder_is_untouched_to_the_last_bit(name: str, kind: str) -> None:
    encoder = copied(_encoder(kind))
    levels, _ = _levels(8, seed=3)
    before = {n: t.clone() for n, t in encoder.backbone.state_dict().items()}
    modules = [(n, type(m), m.training) for n, m in encoder.named_modules()]
    with torch.no_grad():
        features = encoder(_pixels(levels))
    draws = torch.random.get_rng_state()
    rebuild(_scheme(name), encoder, _tune(_scheme(name, Recipe(encoder_rate=1e-2, epochs=1)), encoder).overlay)
    assert torch.equal(torch.random.get_rng_state(), draws), "the global generator was drawn from"
    after = encoder.backbone.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert [(n, type(m), m.training) for n, m in encoder.named_modules()] == modules
    assert not any(p.requires_grad or p.grad is not None for p in encoder.parameters())
    with torch.no_grad():
        assert torch.equal(encoder(_pixels(levels)), features)


# --- LoRA


@pytest.mark.parametrize("kind", ["conv", "vit", "swin"])
def test_lora_merged_equals_unmerged_and_the_formula(kind: str) -> None:
    scheme, work = lora(rank=3, alpha=6), copied(_encoder(kind))
    public = {name: tensor.clone() for name, tensor in work.backbone.state_dict().items()}
    attached = scheme.attach(work, torch.Generator().manual_seed(1))
    pairs = list(zip(attached.weights[::2], attached.weights[1::2], strict=True))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, up in pairs:
            up.copy_(0.05 * torch.randn(up.shape, generator=generator))
        levels, _ = _levels(6, seed=4)
        unmerged = work(_pixels(levels))
        scheme.settle(work)
        merged = work(_pixels(levels))
        before = _encoder(kind)(_pixels(levels))
    assert (merged - before).abs().max() > 0.05 * before.abs().max()
    assert (merged - unmerged).abs().max() <= 1e-5 * before.abs().max().clamp_min(1)
    state = work.backbone.state_dict()
    assert state.keys() == public.keys()
    for name, (down, up) in zip(targets_of(work.backbone), pairs, strict=True):
        product = up.detach().double().flatten(1) @ down.detach().double().flatten(1)
        expected = public[f"{name}.weight"].double() + 6 / 3 * product.view_as(public[f"{name}.weight"])
        torch.testing.assert_close(state[f"{name}.weight"].double(), expected, rtol=0, atol=1e-6)


class _Standardised(nn.Conv2d):
    """A convolution that standardises its weight."""

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-6)
        return F.conv2d(images, weight, self.bias, self.stride, self.padding)


class _Doubled(nn.Linear):
    """A linear layer with a forward of its own that is still linear in its weight."""

    def forward(self, rows: Tensor) -> Tensor:
        return 2 * F.linear(rows, self.weight)


def test_lora_leaves_out_what_it_could_not_be_merged_into() -> None:
    net = nn.ModuleDict(
        {
            "plain": nn.Conv2d(4, 4, 3),
            "strided": nn.Conv2d(4, 4, 3, stride=2, padding=1),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "dilated": nn.Conv2d(4, 4, 3, dilation=2),
            "reflected": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "standardised": _Standardised(4, 4, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "fc": nn.Linear(4, 4),
            "doubled": _Doubled(4, 4),
        }
    )
    assert targets_of(net) == ["plain", "strided", "fc", "doubled"]


class _Sums(nn.Module):
    """Features without a matrix: a scale per channel of the averaged picture."""

    input_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) * self.scale


class _Attends(nn.Module):
    """A transformer layer of torch's own, which has a fused kernel that reads its weights directly."""

    input_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.block(self.embed(images).flatten(2).transpose(1, 2))
        return tokens.mean(dim=1)


def sums() -> nn.Module:
    """See `_Sums`."""
    return _Sums()


def attends() -> nn.Module:
    """See `_Attends`."""
    torch.manual_seed(0)
    return _Attends()


def _own(make: Any) -> Encoder:
    """A user's own network as `python:` loads it, without an importable module around it."""
    from robustbench_x.encoders import python_source
    from robustbench_x.encoders.source import EncoderOptions

    with torch.random.fork_rng(devices=[]):
        return python_source._plain("python:own:net", make().eval(), EncoderOptions()).encoder


def test_lora_without_a_matrix_names_the_way_out() -> None:
    with pytest.raises(SourceError, match=r"neither linear layers nor ungrouped convolutions.*use head full"):
        _tune(lora(), _own(sums))


def test_lora_reaches_a_layer_with_a_fused_kernel() -> None:
    fused = torch.backends.mha.get_fastpath_enabled()
    made = _tune(lora(recipe=QUICK), _own(attends))
    assert {name for name in made.overlay if "linear" in name} == {
        "module.block.linear1.weight",
        "module.block.linear2.weight",
    }
    assert made.settings["targets"] == 3, "the projection inside the attention is read past its module"
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as the import system has it where a package is absent
    assert not lora().installed
    with pytest.raises(
        MissingExtraError, match=r"head lora needs the package peft: pip install 'robustbench-x\[tuning\]'"
    ):
        _build("lora", registry=_registry())
    assert not list(cache.cache_dir().rglob("*.safetensors")), "nothing was computed before it was said"


def test_nothing_imports_peft_before_a_training() -> None:
    script = (
        "import sys, robustbench_x.heads.build; from robustbench_x.registry import load_registry; load_registry();"
        "from robustbench_x.doctor import examine; examine();"
        "print([name for name in ('peft', 'transformers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# --- adapters


@pytest.mark.parametrize(("kind", "axis"), [("conv", 1), ("vit", -1), ("swin", -1)])
def test_an_adapter_starts_as_the_identity_and_then_follows_the_formula(kind: str, axis: int) -> None:
    public, work, scheme = _encoder(kind), copied(_encoder(kind)), adapter(reduction=4)
    levels, _ = _levels(3, seed=5)
    scheme.shape(work)
    scheme.attach(work, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(work(_pixels(levels)), public(_pixels(levels)))
    places = [module for module in work.backbone.modules() if isinstance(module, Adapted)]
    assert len(places) == len(public.layers)
    last = places[-1]
    assert last.axis == axis
    assert last.down.out_features == max(4, last.down.in_features // 4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in (last.up.weight, last.up.bias, last.down.bias):
            weight.copy_(torch.randn(weight.shape, generator=generator))
        before = public.tokens(_pixels(levels), public.layers[-1:])[public.layers[-1]].spatial
        after = work.tokens(_pixels(levels), public.layers[-1:])[public.layers[-1]].spatial
    down, up = last.down.weight.detach().double(), last.up.weight.detach().double()
    assert down.abs().max() > 0
    for n in range(3):
        for t in range(before.shape[1]):
            token = before[n, t].double()
            narrow = [float(row @ token + bias) for row, bias in zip(down, last.down.bias.detach(), strict=True)]
            bent = torch.tensor([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in narrow]).double()
            expected = token + up @ bent + last.up.bias.detach()
            torch.testing.assert_close(after[n, t].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_network_finds_in_an_adapted_layer_what_it_looks_for() -> None:
    encoder, _ = _victim("adapter", "vit")
    images = _pixels(_levels(2, seed=6)[0])
    assert encoder.layers == _encoder("vit").layers
    assert encoder.backbone.get_submodule("model.blocks.0.mlp.fc1") is not None
    with torch.no_grad():
        shallow = encoder.tokens(images, encoder.layers[:1])[encoder.layers[0]]
    assert shallow.prefix is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = encoder.backbone.get_submodule("model.blocks.0").nonsense


class _Layered(nn.Module):
    """A network with layers as told: outputs of its modules `one` and `two`, `two` a part of `one` where nested."""

    def __init__(self, layers: Sequence[str], *, pair: bool = False) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.one = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.GELU())
        self.pair = pair

    def pooled(self, images: Tensor) -> Tensor:
        return self.tokens(images, ["one"])[0].spatial.mean(dim=1)

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        maps = self.one(images)
        shifted = maps.flatten(2).transpose(1, 2) + float(self.pair)
        return [Tokens(shifted, None) for _ in layers]


def _layered(*layers: str, pair: bool = False) -> Encoder:
    preprocessing = Preprocessing(input_size=(32, 32))
    with torch.random.fork_rng(devices=[]):
        return Encoder(source="toy", backbone=_Layered(layers, pair=pair), preprocessing=preprocessing)


@pytest.mark.parametrize(
    ("layers", "pair", "message"),
    [
        ((), False, "toy names no layers, so there is no place for adapters; use head lora or full"),
        (("one", "stage.1"), False, "its layer stage.1 is no module that an adapter could follow"),
        (("one.0", "one"), False, "its layer one.0 lies inside another one, one, so adapters would nest"),
        (("one",), True, "the output of its layer one is not arranged as tokens, NCHW or NHWC"),
    ],
)
def test_an_adapter_without_a_place_says_why(layers: tuple[str, ...], pair: bool, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        _tune(adapter(), _layered(*layers, pair=pair))


# --- the training


def _lesson(count: int = 64) -> Lesson:
    levels, labels = _levels(count, seed=7)
    return Lesson(levels, labels, *hold_out(labels, 0.25, torch.Generator().manual_seed(0)))


def _course(recipe: Recipe, lesson: Lesson) -> tuple[Any, list[float], Encoder, nn.Linear]:
    """A training of every weight, what it told of the held-out loss, and what it left."""
    told: list[str] = []
    work = copied(_encoder())
    found = features = torch.cat([_encoder()(_pixels(lesson.levels))]).detach()
    layer = linear.fit(features[lesson.train], lesson.labels[lesson.train], len(CLASSES), 0)
    assert len(found) == len(lesson.levels)
    weights = full().attach(work, torch.Generator()).weights
    course = train(work, layer, weights, lesson, recipe, seed=0, tell=told.append)
    return course, [float(text.split()[-1]) for text in told if "held-out loss" in text], work, layer


def test_the_best_epoch_is_kept_and_patience_ends_the_training() -> None:
    lesson = _lesson()
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(64, generator=generator) < 0.2  # what is learned by heart soon costs more than it brings
    labels = torch.where(wrong, torch.randint(4, (64,), generator=generator), lesson.labels)
    lesson = lesson._replace(labels=labels)
    course, losses, work, layer = _course(Recipe(encoder_rate=1e-3, epochs=12, patience=3, batch=8), lesson)
    best = min(range(len(losses)), key=losses.__getitem__) + 1
    assert 1 < course.best_epoch == best < course.epochs == len(losses) == best + 3 < 12
    logits = predictions(work, layer, lesson.levels[lesson.held_out], 8)
    assert torch.equal(logits, course.held_out_logits)
    kept = float(F.cross_entropy(logits, lesson.labels[lesson.held_out]))
    assert kept == pytest.approx(min(losses), abs=1e-4)
    assert kept < losses[-1] - 1e-3
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize(("steps", "warmup", "peak"), [(40, 0.1, 3), (40, 0.0, 0), (3, 0.1, 0), (1, 0.5, 0)])
def test_the_rate_rises_to_its_full_size_and_then_falls(steps: int, warmup: float, peak: int) -> None:
    shares = [share_of_rate(step, steps, warmup) for step in range(steps)]
    assert shares[peak] == max(shares) == 1.0
    assert shares[: peak + 1] == [(step + 1) / (peak + 1) for step in range(peak + 1)]
    assert all(0 < after <= before for before, after in itertools.pairwise(shares[peak:]))


def test_a_training_that_never_beats_the_probe_says_so() -> None:
    found = _found(_encoder())
    lots = torch.randint(4, (160,), generator=torch.Generator().manual_seed(0))  # nothing to learn but by heart
    made = _tune(full(QUICK), _encoder(), found._replace(labels=lots)).settings
    assert made["held_out_loss"] > made["probe_held_out_loss"] + 0.01
    assert made["best_epoch"] in (1, 2)


def test_the_training_tells_its_epochs() -> None:
    told: list[str] = []
    recipe = Recipe(encoder_rate=1e-3, epochs=2, batch=32)
    found = _found(_encoder(), count=80)
    tune(full(recipe), _encoder(), found, num_classes=4, seed=0, device=CPU, batch_size=8, tell=told.append)
    assert [text.partition(", loss")[0] for text in told] == [
        "linear probe",
        "epoch 1 of 2, 32 of 72 images",
        "epoch 1 of 2, 64 of 72 images",
        "epoch 1 of 2, 72 of 72 images",
        told[4],
        "epoch 2 of 2, 32 of 72 images",
        "epoch 2 of 2, 64 of 72 images",
        "epoch 2 of 2, 72 of 72 images",
        told[8],
        "measuring the tuned victim",
    ]
    assert told[4].startswith("epoch 1 of 2, held-out loss ")


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(SampleError, match=r"fine-tuning broke down: at epoch 1.*the loss is (nan|inf)"):
        _tune(full(Recipe(encoder_rate=1e30, epochs=1, batch=8)), _encoder())


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    class Locked(_Sums):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(SourceError, match=r"cannot be copied \(TypeError: cannot pickle .*lock.*use head linear"):
        _tune(full(), _own(Locked))


def test_a_network_whose_copy_shares_its_weights_is_refused_before_they_change() -> None:
    class Single(_Sums):
        def __deepcopy__(self, memo: dict[int, Any]) -> "Single":
            return self

    encoder = _own(Single)
    with pytest.raises(SourceError, match="a copy of its network shares its weights; use head linear"):
        _tune(full(), encoder)
    assert state_sha256(encoder.backbone.state_dict()) == encoder.sha256
    assert not any(weight.requires_grad for weight in encoder.parameters())


def test_a_network_that_runs_past_its_copy_is_refused() -> None:
    class Captured(nn.Module):
        input_size = 32

        def __init__(self) -> None:
            super().__init__()
            self.inner = _Sums()
            inner = self.inner

            def run(images: Tensor) -> Tensor:
                features: Tensor = inner(images)
                return features

            self.run = run  # a function is not copied: it still means the public network

        def forward(self, images: Tensor) -> Tensor:
            return self.run(images)

    with pytest.raises(SourceError, match="its features do not depend on the copied weights"):
        _tune(full(), _own(Captured))


def test_a_class_without_images_is_an_error() -> None:
    found = _found(_encoder())
    kept = found.labels != 2
    assert found.levels is not None
    with pytest.raises(DataError, match="class index 2 has no training sample"):
        _tune(full(), _encoder(), Features(found.features[kept], found.labels[kept], (), found.levels[kept]))


def test_classes_of_one_image_are_trained_on_and_decide() -> None:
    made = _tune(full(QUICK), _encoder(), _found(_encoder(), count=4)).settings
    assert (made["trained_on"], made["held_out_samples"]) == (4, 4)


# --- cache and files


def _picture(levels: Tensor) -> Any:
    import PIL.Image

    return PIL.Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _dataset(seed: int = 0, broken: int = 0, relabel: int = 0) -> Dataset:
    levels, labels = _levels(48, seed)
    items = [
        Item(id=str(i), label=(int(label) + relabel) % 4, load=functools.partial(_picture, image))
        for i, (image, label) in enumerate(zip(levels, labels, strict=True))
    ]
    items += [Item(id=f"broken{i}", label=0, load=functools.partial(_unreadable, f"b{i}.png")) for i in range(broken)]
    return Dataset(source="toy:patterns", classes=CLASSES, train=tuple(items), test=tuple(items))


def _unreadable(name: str) -> Any:
    raise DataError(f"{name} is no image")


def _registry(recipe: Recipe = QUICK) -> Registry:
    registry = Registry()
    for spec in HEADS:
        if spec.tune is None:
            registry.add_head(spec)
    for name in SCHEMES:
        registry.add_head(tuned(_scheme(name, recipe), "short"))
    return registry


def _build(
    name: str,
    encoder: Encoder | None = None,
    *,
    dataset: Dataset | None = None,
    registry: Registry | None = None,
    seed: int = 0,
    told: list[str] | None = None,
) -> FittedHead:
    return build_head(
        name,
        loaded=LoadedEncoder(encoder or _encoder(), None),
        dataset=dataset or _dataset(),
        registry=registry or _registry(),
        seed=seed,
        device=CPU,
        batch_size=16,
        progress=None if told is None else told.append,
    )


def _answers(head: FittedHead) -> Tensor:
    assert head.encoder is not None
    return _logits(head.encoder, head, _levels(12, seed=8)[0])


@pytest.mark.parametrize("name", SCHEMES)
def test_a_tuned_head_from_the_cache_is_the_same_to_the_last_bit(name: str) -> None:
    told: list[str] = []
    fresh, again = _build(name), _build(name, told=told)
    assert told == ["48 of 48 images"], "nothing was trained"
    assert torch.equal(_answers(fresh), _answers(again))
    assert fresh.settings == again.settings
    assert fresh.changed == again.changed
    assert (fresh.settings["kind"], fresh.settings["train_samples"]) == (name, 48)
    assert fresh.settings["encoder_sha256"] == _encoder().sha256
    assert not any(p.requires_grad for p in again.parameters())
    assert not any(m.training for m in again.modules())
    (path,) = cache.cache_dir().rglob("tuned-*.safetensors")
    assert path.stat().st_size < 60_000 + 8 * sum(
        fresh.state_dict()[f"encoder.backbone.{n}"].numel() for n in fresh.changed
    )


def test_a_damaged_cache_entry_is_made_again() -> None:
    fresh = _build("full")
    (path,) = cache.cache_dir().rglob("tuned-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    told: list[str] = []
    assert torch.equal(_answers(_build("full", told=told)), _answers(fresh)), "on a CPU a training repeats itself"
    assert any("epoch" in text for text in told)


def test_everything_that_decides_the_training_decides_the_cache_key() -> None:
    class Louder(nn.Module):
        """Other code with the same weights."""

        layers: tuple[str, ...] = ()

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def pooled(self, images: Tensor) -> Tensor:
            features: Tensor = 2 * self.inner(images)
            return features

        def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
            return []

    class Plain(Louder):
        def pooled(self, images: Tensor) -> Tensor:
            features: Tensor = self.inner(images)
            return features

    preprocessing = Preprocessing(input_size=(32, 32))
    plain, louder = (
        Encoder(source="toy", backbone=kind(_Sums()), preprocessing=preprocessing) for kind in (Plain, Louder)
    )
    assert plain.sha256 == louder.sha256
    short = Recipe(encoder_rate=1e-3, epochs=1)
    registry = _registry(short)
    heads = [
        _build("full", plain, registry=registry),
        _build("full", louder, registry=registry),
        _build("full", plain, registry=registry, seed=1),
        _build("full", plain, registry=registry, dataset=_dataset(seed=1)),
        _build("full", plain, registry=registry, dataset=_dataset(relabel=1)),
        _build("full", plain, registry=_registry(Recipe(encoder_rate=1e-3, epochs=1, decay=0.02))),
    ]
    assert len({head.settings["cache_key"] for head in heads}) == 6
    assert len(list(cache.cache_dir().rglob("tuned-*.safetensors"))) == 6


def test_unreadable_images_are_left_out_and_named() -> None:
    head = _build("full", dataset=_dataset(broken=2))
    assert head.settings["unreadable"] == 2
    assert head.settings["unreadable_first"] == ["b0.png is no image", "b1.png is no image"]
    assert (head.settings["trained_on"], head.settings["held_out_samples"]) == (44, 4)


def test_what_goes_wrong_is_told_with_the_head_and_the_data() -> None:
    broken = _registry(Recipe(encoder_rate=1e30, epochs=1, batch=4))
    with pytest.raises(SampleError, match="head full on toy:patterns: the fine-tuning broke down"):
        _build("full", registry=broken)


def test_pixels_are_kept_only_when_asked_for() -> None:
    items = _dataset(broken=1).train
    plain = features_of(_encoder(), items, batch_size=16, device=CPU)
    kept = features_of(_encoder(), items, batch_size=16, device=CPU, keep_pixels=True)
    assert plain.levels is None
    assert kept.levels is not None
    assert torch.equal(kept.levels, _levels(48, 0)[0])
    assert torch.equal(kept.features, plain.features)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_saved_tuned_head_comes_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, path = _build(name), tmp_path / "head.safetensors"
    save_head(head, path)
    monkeypatch.setitem(sys.modules, "peft", None)  # a stored head needs nothing to be judged with
    told: list[str] = []
    again = _build(f"file:{path}", told=told)
    assert told == []
    assert torch.equal(_answers(head), _answers(again))
    assert again.aliases == head.aliases
    assert again.encoder is not None
    assert again.encoder.sha256 == head.settings["tuned_sha256"]
    assert {k: v for k, v in again.settings.items() if k != "file_sha256"} == head.settings
    save_head(again, tmp_path / "copy.safetensors")
    assert torch.equal(_answers(_build(f"file:{tmp_path / 'copy.safetensors'}")), _answers(head))


def test_a_tuned_head_of_other_weights_or_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_head(_build("lora"), path)
    other = load_encoder("python:project:other", load_registry()).encoder
    with pytest.raises(SourceError, match="was fitted on an encoder with sha256"):
        _build(f"file:{path}", other)
    inner = copied(_encoder())
    larger = Encoder(
        source="python:larger",
        backbone=inner.backbone,
        preprocessing=Preprocessing(input_size=(36, 36)),
        sha256=inner.sha256,
    )
    larger.feature_dim = _encoder().feature_dim
    with pytest.raises(SourceError, match=r"was tuned at 32 x 32 pixels.*write \?size=32 behind the encoder"):
        _build(f"file:{path}", larger)


def test_tuned_weights_that_do_not_fit_are_refused() -> None:
    overlay = _made("lora").overlay
    with pytest.raises(SourceError, match=r"tuned weights do not fit timm:vit.*: it has no module.early"):
        rebuild(lora(), _encoder("vit"), overlay)
    name = next(iter(overlay))
    with pytest.raises(
        SourceError, match=r"do not fit python:project:tiny: module.early.0.weight has shape \(1, 2\), not"
    ):
        rebuild(lora(), _encoder(), {name: torch.zeros(1, 2)})
    with pytest.raises(SourceError, match=r"give sha256 .* are not those it was tuned from"):
        rebuild(lora(), _encoder(), {}, sha256=_made("lora").settings["tuned_sha256"])
    assert overlay_of(rebuild(lora(), _encoder(), overlay), lora(), _encoder()).keys() == overlay.keys()


def test_the_page_on_heads_shows_how_to_save_one(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "heads.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    small = {"packaged:efficientnet_lite0?size=96": TINY, "packaged:digits": f"folder:{images}", '"lora"': '"full"'}
    for shown, quick in small.items():
        assert code.count(shown) == 1
        code = code.replace(shown, quick)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/heads.md", "exec"), {})
    saved = _build("file:head.safetensors", registry=load_registry())
    assert saved.settings["scheme"] == "full"
    assert saved.encoder is not None


def test_predictions_come_in_parts_of_any_size() -> None:
    levels, _ = _levels(7, seed=1)
    whole = predictions(_encoder(), nn.Identity(), levels, 7)
    torch.testing.assert_close(predictions(_encoder(), nn.Identity(), levels, 3), whole)


def test_tuned_heads_are_in_the_catalogue() -> None:
    specs = {spec.name: spec for spec in HEADS if spec.tune is not None}
    assert set(specs) == set(SCHEMES)
    for name, spec in specs.items():
        assert spec.tune is not None
        assert spec.settings == spec.tune.settings
        assert (spec.fit, spec.tune.name, spec.settings["scheme"]) == (None, name, name)
        assert "tuned victim" in spec.summary
        assert len(spec.tune.documentation) > 200
