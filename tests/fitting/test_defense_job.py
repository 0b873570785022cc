"""Defences that are trained first: patches, what is held out, artefacts and their keys, imitations, several looks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from project import PGD, TINY, attack, audit, audit_config, defense, registry
from robustbench_x.data.dataset import Dataset, Item
from robustbench_x.engine import run_audit
from robustbench_x.engine.fit import FitRequest, fit_plugin
from robustbench_x.engine.progress import Silent
from robustbench_x.engine.supply import Supply
from robustbench_x.errors import DataError, RunError, SampleError, SourceError, UsageError
from robustbench_x.fitting import Artifact, read_artifact
from robustbench_x.fitting.adam import optimizer_state, restore_optimizer
from robustbench_x.fitting.defense_job import DefenseJob
from robustbench_x.fitting.ground import Ground, Pool
from robustbench_x.fitting.imitation import ImitationJob, ImitationRecipe, Imitator, arm_imitation
from robustbench_x.fitting.patches import make_patches
from robustbench_x.plugin import Defense, DefenseSpec, Fitted, Trainer, param
from robustbench_x.testing.toys import toy_ground, toy_victim
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import DefendedEncoder, Shield, perceive
from robustbench_x.views import DefenseFitView, EncoderHandle, EncoderView, FitView, Meter

CPU = torch.device("cpu")
TOY = toy_victim()
SURROGATE = "fractal:classes=2,train=8,test=1,size=32"


@pytest.fixture(autouse=True)
def _no_earlier_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBX_CACHE", str(tmp_path / "cache"))


# -- patches


def _item(name: str, width: int, height: int, colour: int = 0) -> Item:
    random = np.random.default_rng(colour)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[..., 0] = colour
    return Item(id=name, label=0, load=lambda: PIL.Image.fromarray(pixels))


def _unreadable(name: str) -> Item:
    def load() -> PIL.Image.Image:
        raise DataError(f"{name} cannot be read as an image")

    return Item(id=name, label=0, load=load)


ITEMS = [_item(f"p{k}", 20 + 4 * k, 30, colour=40 * k) for k in range(6)]


def _sources(pool: Pool) -> list[int]:
    """Which item each patch is of, by its red value."""
    return [int(patch[0].float().mean().round()) // 40 for patch in pool.levels]


def test_patches_are_seeded() -> None:
    one, again = (make_patches("toy", ITEMS, side=16, count=12, seed=1) for _ in range(2))
    other = make_patches("toy", ITEMS, side=16, count=12, seed=2)
    assert torch.equal(one.levels, again.levels)
    assert one.sha256 == again.sha256 != other.sha256
    assert one.levels.shape == (12, 3, 16, 16)
    assert one.levels.dtype == torch.uint8


@pytest.mark.parametrize("count", [4, 6, 15, 18])
def test_patches_are_even_over_the_photographs_and_lie_together(count: int) -> None:
    of = _sources(make_patches("toy", ITEMS, side=16, count=count, seed=0))
    counts = [of.count(k) for k in range(6)]
    assert len(of) == count
    assert max(counts) - min(counts) <= 1
    runs = [k for place, k in enumerate(of) if place == 0 or of[place - 1] != k]
    assert len(runs) == len(set(runs)), "each photograph's are next to each other"


def test_patches_are_squares_of_every_scale() -> None:
    ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[None, :, None], (128, 128, 3))
    item = Item(id="ramp", label=0, load=lambda: PIL.Image.fromarray(np.ascontiguousarray(ramp)))
    pool = make_patches("toy", [item], side=16, count=200, seed=0)
    spans = (pool.levels[:, 0, 8, -1].float() - pool.levels[:, 0, 8, 0].float()) * 16 / 15
    assert 31 <= float(spans.min()) < 36, "a quarter"
    assert 115 < float(spans.max()) <= 130, "the whole"
    assert float(spans.log2().median()) == pytest.approx(6, abs=0.25), "uniform in the logarithm"
    left = pool.levels[:, 0, 8, 0].float()
    assert float(left.min()) < 5
    assert float(left.max()) > 80, "at every place"


def test_a_photograph_of_the_very_size_is_one_whole_patch() -> None:
    item = _item("exact", 16, 16, colour=7)
    pool = make_patches("toy", [item], side=16, count=2, seed=0)
    whole = torch.from_numpy(np.array(item.load())).permute(2, 0, 1)
    assert torch.equal(pool.levels[0], whole)


def test_what_cannot_serve_is_left_out_and_named() -> None:
    items = [*ITEMS, _item("tiny", 15, 40), _unreadable("broken")]
    pool = make_patches("toy", items, side=16, count=16, seed=0)
    assert sorted(pool.unreadable) == ["broken cannot be read as an image", "tiny is smaller than a patch of 16 pixels"]
    assert len(pool.levels) == 12


def test_no_usable_image_is_an_error() -> None:
    with pytest.raises(DataError, match=r"surrogate toy: none of 2 images can be used: .*smaller than a patch of 64"):
        make_patches("toy", ITEMS[:2], side=64, count=8, seed=0)


# -- what a training is handed


@dataclass(frozen=True, kw_only=True)
class Blends:
    """Learns the mean image's colour and blends it in."""

    artifact: str = param("", "file")
    share: float = param(0.5, "of the colour")
    rate: float = param(1.0, "decides what is learned")

    def trainer(self, view: DefenseFitView) -> Trainer:
        return _Means(view, self.rate)

    def armed(self, learned: Mapping[str, Tensor]) -> Defense:
        if "colour" not in learned:
            raise ValueError("these hold no colour")
        return _Blended(learned["colour"], self.share)


@dataclass(frozen=True)
class _Blended:
    colour: Tensor
    share: float

    def apply(self, images: Tensor) -> Tensor:
        return (1 - self.share) * images + self.share * self.colour.view(1, 3, 1, 1)


class _Means:
    """One step over all images."""

    steps, batch = 1, 2

    def __init__(self, view: DefenseFitView, rate: float) -> None:
        self._view, self._rate = view, rate
        self._colour = torch.zeros(3)

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        images = self._view.images.batch(torch.arange(len(self._view.images)))
        assert int(index.max()) < len(self._view.images)
        self._colour = self._rate * images.mean(dim=(0, 2, 3))
        return {"colour": self._colour.mean()}

    def state(self) -> dict[str, Tensor]:
        return self.result()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._colour = state["colour"]

    def result(self) -> dict[str, Tensor]:
        return {"colour": self._colour}


BLENDS = defense(
    Blends,
    fits=True,
    fitted_by=("rate",),
    patch=lambda made: 16,
    reads=lambda made: (),
    knowledge=("oblivious", "bpda", "bpda_learned", "full"),
)


def _ground(count: int = 24, **changes: Any) -> Ground:
    levels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    shared: dict[str, Any] = {"public": None, "threat": ThreatModel(eps=0), "seed": 0, "device": CPU}
    return Ground(**{**shared, "pool": Pool(source="toy", levels=levels, sha256="toy"), **changes})


def _job(spec: DefenseSpec = BLENDS, count: int = 24, **params: Any) -> DefenseJob:
    return DefenseJob(spec=spec, defense=spec.build(params), ground=_ground(count))


def _numbers(pool: Any) -> set[int]:
    images = pool.batch(torch.arange(len(pool)))
    return {int(number) for number in images[:, 0, 0, 0].mul(255).round()}


@pytest.mark.parametrize(("detects", "count", "kept"), [(False, 24, 21), (True, 24, 16), (False, 2, 1), (True, 3, 2)])
def test_held_out_images_are_never_handed_to_the_training(detects: bool, count: int, kept: int) -> None:
    view = _job(replace(BLENDS, detects=detects), count).view(Meter())
    trained, held = _numbers(view.images), _numbers(view.held_out)
    assert len(trained) == kept
    assert trained | held == set(range(count))
    assert not trained & held


def test_images_are_held_out_of_every_class() -> None:
    """A pool lies in the order of its classes; a threshold of the last ones alone would not hold for the others."""
    spec = replace(BLENDS, per_encoder=True, detects=True)
    ground = _ground(90, public=TOY.encoder)
    job = DefenseJob(spec=spec, defense=spec.build(), ground=ground)
    view = job.view(Meter())
    trained, held = _numbers(view.images), _numbers(view.held_out)
    assert (len(trained), len(held)) == (60, 30)
    assert trained | held == set(range(90))
    assert all(4 <= len([n for n in held if n // 30 == third]) <= 16 for third in range(3))
    assert held == _numbers(job.view(Meter()).held_out), "the same ones each time"
    other = replace(job, ground=replace(ground, seed=1))
    assert held != _numbers(other.view(Meter()).held_out)


def test_one_image_is_too_few() -> None:
    with pytest.raises(SampleError, match="blends needs two images or more to learn from, there is 1"):
        _job(count=1).view(Meter())


def test_the_artefact_says_what_it_was_made_of() -> None:
    made = _job(rate=0.5).run(None)
    assert float(made.tensors["colour"][0]) == pytest.approx(0.5 * 10 / 255, abs=1e-6)
    assert made.provenance.params == {"rate": 0.5}
    assert (made.provenance.encoder, made.provenance.surrogate_samples) == ("none", 24)


# -- keys


def test_the_key_is_of_what_decides_the_training() -> None:
    key = _job().key()
    assert _job(share=0.9).key() == key
    assert _job(rate=2.0).key() != key
    assert _job(count=23).key() != key
    assert replace(_job(), ground=_ground(seed=1)).key() != key
    assert replace(_job(), ground=_ground(public=TOY.encoder)).key() != key


def test_the_key_is_of_the_content_of_the_files_it_reads(tmp_path: Path) -> None:
    file = tmp_path / "pairs.bin"
    file.write_bytes(b"one")
    spec = replace(BLENDS, reads=lambda made: (file,))
    before = _job(spec).key()
    file.touch()
    assert _job(spec).key() == before
    file.write_bytes(b"two")
    assert _job(spec).key() != before
    file.unlink()
    with pytest.raises(SourceError, match=r"blends: .*pairs.bin"):
        _job(spec).key()


# -- artefacts that do not belong


def _fit(out: Path, *, plugin: str = "blends", encoder: str | None = None, **params: Any) -> Path:
    request = FitRequest(
        plugin=plugin,
        encoder=encoder,
        threat=ThreatModel(eps=0),
        out=out,
        params=params,
        surrogate=SURROGATE,
        samples=16,
        device="cpu",
    )
    fit_plugin(request, registry(BLENDS))
    return out


def test_an_artefact_serves_every_audit_that_asks_for_nothing_else(images: Path, tmp_path: Path) -> None:
    path = _fit(tmp_path / "a.safetensors", rate=0.5)
    shields = [{"name": "blends", "artifact": str(path), "knowledge": ["oblivious"]}]
    config = audit_config(images, attacks=["noise"], defenses=shields, samples=4)
    done = audit(config, tmp_path / "out", BLENDS)
    (info,) = done.report.defenses
    assert info.fit is not None
    assert info.fit.sha256 == read_artifact(path).sha256
    assert info.fit.origin == f"artefact {path}"
    assert info.params["rate"] == 0.5, "what it was trained with, not this audit's default"


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({"rate": 0.5}, {"name": "blends", "rate": 0.7}, "was trained with rate=0.5, not 0.7; leave blends.rate out"),
        ({"plugin": "mvg", "encoder": TINY}, {"name": "blends"}, "was fitted by mvg, not by blends"),
        (
            {"plugin": "mvg", "encoder": "python:project:other"},
            {"name": "mvg"},
            "was fitted on python:project:other with sha256 [0-9a-f]{64}",
        ),
        ({"plugin": "mvg", "encoder": TINY}, {"name": "mvg", "layers": "early"}, "with layers=pooled, not early"),
        (
            {"plugin": "feature_squeezing", "encoder": TINY},
            {"name": "feature_squeezing", "bits": 3},
            "with bits=5, not 3",
        ),
        ({}, {"name": "blends", "artifact": "shipped"}, "blends ships no artefact for its defaults; set blends"),
        ({}, {"name": "blends", "artifact": "missing.safetensors"}, "there is no such file"),
    ],
    ids=str,
)
def test_an_artefact_that_does_not_belong_is_refused_by_name(
    made: dict[str, Any], asked: dict[str, Any], message: str, images: Path, tmp_path: Path
) -> None:
    path = _fit(tmp_path / "a.safetensors", **made)
    config = audit_config(images, attacks=["noise"], defenses=[{"artifact": str(path), **asked}], samples=4)
    with pytest.raises(UsageError, match=message):
        run_audit(config, tmp_path / "out", registry=registry(BLENDS))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"plugin": "mvg"}, "mvg is fitted on one encoder; name it with --encoder"),
        ({"encoder": TINY}, "blends serves every encoder alike; leave --encoder out"),
        ({"artifact": "x"}, "blends.artifact is for an audit"),
        ({"plugin": "jpeg"}, "jpeg has nothing to train; rbx fit takes .*raw_isp.*mvg"),
    ],
    ids=str,
)
def test_what_rbx_fit_cannot_train_is_said(request_: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        _fit(tmp_path / "a.safetensors", **request_)


def _supply(items: tuple[Item, ...], samples: int = 8) -> Supply:
    return Supply(
        registry=registry(BLENDS),
        open_dataset=lambda source: Dataset(source=source, classes=("a",), train=(), test=items),
        surrogate="toy",
        samples=samples,
        seed=0,
        device=CPU,
        progress=Silent(),
    )


def test_a_defence_for_all_encoders_is_trained_once() -> None:
    supply = _supply(tuple(ITEMS))
    first = supply.defense(BLENDS, BLENDS.build(), TOY.encoder)
    again = supply.defense(BLENDS, BLENDS.build(), toy_victim(seed=1).encoder)
    assert first.artifact.sha256 == again.artifact.sha256
    assert (first.origin, again.origin) == ("fitted for this run", "fitted earlier with these settings")
    assert first.artifact.provenance.encoder_sha256 == ""
    assert first.artifact.provenance.input_size == (16, 16)


def test_a_detector_learns_from_the_training_images_and_else_from_the_surrogate_ones() -> None:
    spec = registry().defenses["mvg"]
    supply = _supply(tuple(ITEMS))
    train = Dataset(source="own", classes=("a",), train=tuple(ITEMS[:4]), test=tuple(ITEMS[4:]))
    job = supply.defense_job(spec, spec.build(), TOY.encoder, train)
    assert (job.ground.pool.source, len(job.ground.pool.levels)) == ("own (training images)", 4)
    bare = replace(train, train=())
    job = supply.defense_job(spec, spec.build(), TOY.encoder, bare)
    assert (job.ground.pool.source, len(job.ground.pool.levels)) == ("toy", 6)


@dataclass(frozen=True, kw_only=True)
class Untrainable(Blends):
    """Breaks down while it trains."""

    def trainer(self, view: DefenseFitView) -> Trainer:
        raise RuntimeError("no luck")


@dataclass(frozen=True, kw_only=True)
class Leaving(Blends):
    """Ends the process while it trains."""

    def trainer(self, view: DefenseFitView) -> Trainer:
        raise SystemExit(0)


@dataclass(frozen=True, kw_only=True)
class Spoilt(Blends):
    """Refuses whatever it learned."""

    def armed(self, learned: Mapping[str, Tensor]) -> Defense:
        raise RuntimeError("no luck")


def test_a_file_that_the_plugin_refuses_ends_the_audit_by_name(images: Path, tmp_path: Path) -> None:
    plugins = registry(defense(Spoilt, fits=True, patch=lambda made: 16))
    path = tmp_path / "a.safetensors"
    shared: dict[str, Any] = {"surrogate": SURROGATE, "samples": 8, "device": "cpu", "params": {}}
    fit_plugin(FitRequest(plugin="spoilt", out=path, encoder=None, threat=ThreatModel(eps=0), **shared), plugins)
    shields = [{"name": "spoilt", "artifact": str(path)}]
    config = audit_config(images, attacks=["noise"], defenses=shields, samples=4, surrogate=SURROGATE)
    with pytest.raises(UsageError, match=r"a\.safetensors\) cannot be used: RuntimeError: no luck"):
        run_audit(config, tmp_path / "out", registry=plugins)


@pytest.mark.parametrize(
    ("factory", "message"), [(Untrainable, "no luck"), (Leaving, "SystemExit: 0"), (Spoilt, "cannot be used: Runtime")]
)
def test_a_defence_whose_training_fails_is_an_error_and_the_rest_goes_on(
    factory: type, message: str, images: Path, tmp_path: Path
) -> None:
    planted = defense(factory, fits=True, patch=lambda made: 16)
    shields = [planted.name, "blends"]
    attacks = [PGD, {"name": "uap", "steps": 2}, {"name": "square", "queries": 4}]
    settings: dict[str, Any] = {"samples": 4, "surrogate": SURROGATE, "surrogate_samples": 16, "ladder": False}
    config = audit_config(images, attacks=attacks, defenses=shields, **settings)
    done = audit(config, tmp_path / "out", planted, BLENDS)
    behind = [cell for cell in done.report.cells if cell.defense == planted.name]
    assert {cell.knowledge for cell in behind} == {"oblivious", "bpda", "full"}
    for cell in behind:
        assert (cell.n_errors, cell.n, cell.metrics["robust_accuracy"].value) == (4, 4, None), cell.id
        assert all(message in row["error"] for row in done.of(cell)), cell.id
        (flag,) = [flag for flag in cell.flags if flag.id == "sample_errors"]
        assert message in flag.message, "the report says why"
    assert all(cell.n_errors == 0 for cell in done.report.cells if cell.defense != planted.name)
    assert done.decide().exit_code == 3
    (worst,) = [w for w in done.report.worst_case if w.defense == planted.name]
    assert worst.robust_accuracy.value is None
    again = audit(config, tmp_path / "out", planted, BLENDS)
    assert again.report == done.report, "it fails again, so it is the very audit"


def test_a_run_whose_defence_failed_is_not_continued_once_it_works(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = defense(Untrainable, fits=True, patch=lambda made: 16)
    config = audit_config(images, attacks=["noise"], defenses=["untrainable"], samples=4, surrogate=SURROGATE)
    audit(config, tmp_path / "out", planted)
    monkeypatch.setattr(Untrainable, "trainer", Blends.trainer)
    with pytest.raises(RunError, match="changed since this audit was finished"):
        audit(config, tmp_path / "out", planted)


def test_an_imitation_that_fails_spoils_its_own_rung_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: ImitationJob, *args: Any) -> Artifact:
        raise RuntimeError("no luck")

    monkeypatch.setattr(ImitationJob, "run", broken)
    shields = [{"name": "blurs", "knowledge": ["oblivious", "bpda", "bpda_learned", "full"]}]
    attacks = [PGD, {"name": "uap", "steps": 2}]
    settings: dict[str, Any] = {"samples": 4, "surrogate": SURROGATE, "surrogate_samples": 16}
    done = audit(audit_config(images, attacks=attacks, defenses=shields, **settings), tmp_path / "out", BLURS)
    for cell in done.report.cells:
        expected = 4 if cell.knowledge == "bpda_learned" else 0
        assert cell.n_errors == expected, cell.id
        assert all("the training of imitation of blurs failed" in row["error"] for row in done.of(cell)[:expected])
    assert done.decide().exit_code == 3
    doubts = {f.id for f in done.report.findings if f.cell and "bpda_learned" in f.cell}
    assert doubts == {"sample_errors", "probe_failed"}


# -- imitations


@dataclass(frozen=True, kw_only=True)
class Blurs:
    """A linear blur."""

    width: int = param(3, "of the window")

    def apply(self, images: Tensor) -> Tensor:
        edge = self.width // 2
        return F.avg_pool2d(F.pad(images, (edge,) * 4, mode="replicate"), self.width, stride=1)


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Three looks at each image, of another size."""

    def apply(self, images: Tensor) -> Tensor:
        small = F.interpolate(images, (12, 12), mode="bilinear", antialias=True, align_corners=False)
        return torch.stack([small, small.flip(3), 0.5 * small], dim=1)


BLURS, LOOKS = defense(Blurs), defense(Looks)


def _imitation(spec: DefenseSpec, learned: str = "", steps: int = 150, **params: Any) -> ImitationJob:
    shield = Shield(spec=spec, defense=spec.build(params), learned=learned)
    ground = toy_ground(TOY, ThreatModel(eps=0))
    return ImitationJob(ground=ground, shield=shield, shield_params=params, recipe=ImitationRecipe(steps=steps))


def test_the_key_of_an_imitation_is_of_the_defence() -> None:
    key = _imitation(BLURS).cache_key()
    assert key == _imitation(BLURS).cache_key()
    others = [
        _imitation(BLURS, width=5).cache_key(),
        _imitation(BLURS, learned="ab").cache_key(),
        _imitation(BLURS, steps=3).cache_key(),
        _imitation(LOOKS).cache_key(),
        replace(_imitation(BLURS), ground=toy_ground(TOY, ThreatModel(eps=0), seed=1)).cache_key(),
    ]
    assert len({key, *others}) == 6


def test_an_untrained_imitation_is_the_identity() -> None:
    images = torch.rand(2, 3, 9, 11)
    assert torch.equal(Imitator()(images), images)


@pytest.fixture(scope="module")
def blur_imitation() -> Artifact:
    """Trained for long: the default is for images with many more pixels than these."""
    return _imitation(BLURS, steps=600).run(None)


def test_a_linear_blur_is_imitated(blur_imitation: Artifact) -> None:
    losses = blur_imitation.provenance.losses
    assert losses["imitation"] < 0.15 * losses["identity"]
    imitation = arm_imitation(blur_imitation.tensors, CPU)
    clean, blurred = TOY.images, Blurs().apply(TOY.images)
    assert float(F.mse_loss(imitation(clean), blurred)) < 0.3 * float(F.mse_loss(clean, blurred))


def test_an_imitation_is_seeded_and_its_default_length_halves_the_error() -> None:
    one, again = (_imitation(BLURS).run(None) for _ in range(2))
    assert one.sha256 == again.sha256
    assert one.provenance.losses["imitation"] < 0.5 * one.provenance.losses["identity"]


def test_several_looks_of_another_size_can_be_imitated() -> None:
    made = _imitation(LOOKS, steps=2).run(None)
    assert all(tensor.isfinite().all() for tensor in made.tensors.values())


def test_other_weights_are_no_imitation() -> None:
    with pytest.raises(SampleError, match="these are no weights of an imitation"):
        arm_imitation({"delta": torch.zeros(3)}, CPU)


def _seen(shield: Shield, knowledge: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    pixels = TOY.images.clone().requires_grad_(True)
    out = perceive(shield, knowledge)(pixels)
    (gradient,) = torch.autograd.grad((out * weight).sum(), pixels)
    return out.detach(), gradient


def test_bpda_learned_has_the_deployed_value_and_the_imitation_s_slope(blur_imitation: Artifact) -> None:
    made = blur_imitation
    shield = Shield(spec=BLURS, defense=Blurs(), imitation=arm_imitation(made.tensors, CPU))
    weight = torch.randn(TOY.images.shape, generator=torch.Generator().manual_seed(0))
    _, true = _seen(shield, "full", weight)
    value_, learned = _seen(shield, "bpda_learned", weight)
    _, identity = _seen(shield, "bpda", weight)
    assert torch.equal(value_, Blurs().apply(TOY.images)), "bit for bit"
    assert torch.equal(identity, weight)
    cosine = [float(F.cosine_similarity(g.flatten(), true.flatten(), dim=0)) for g in (learned, identity)]
    assert cosine[0] > cosine[1] + 0.1
    net = arm_imitation(made.tensors, CPU)
    pixels = TOY.images.clone().requires_grad_(True)
    (by_hand,) = torch.autograd.grad((net(pixels) * weight).sum(), pixels)
    assert torch.allclose(learned, by_hand, atol=1e-6)


def test_nobody_passes_through_an_imitation_that_is_not_there() -> None:
    with pytest.raises(AssertionError, match="nobody trained an imitation of blurs"):
        perceive(Shield(spec=BLURS, defense=Blurs()), "bpda_learned")
    shield = Shield(spec=BLURS, defense=Blurs(), unimitated="it would not be imitated")
    with pytest.raises(SampleError, match="it would not be imitated"):
        perceive(shield, "bpda_learned")
    assert [shield.barred(level) for level in ("none", "oblivious", "bpda", "full")] == [""] * 4


def test_an_audit_trains_an_imitation_only_where_one_is_asked_for(images: Path, tmp_path: Path) -> None:
    config = audit_config(images, defenses=["blurs"], samples=8, surrogate=SURROGATE, surrogate_samples=16)
    done = audit(config, tmp_path / "a", BLURS)
    assert {c.knowledge for c in done.report.cells if c.attack == "pgd"} == {"none", "oblivious", "bpda", "full"}
    assert not list((tmp_path / "cache").glob("fits/*"))
    shields = [{"name": "blurs", "knowledge": ["bpda", "bpda_learned"]}]
    config = audit_config(images, defenses=shields, samples=8, surrogate=SURROGATE, surrogate_samples=16)
    done = audit(config, tmp_path / "b", BLURS)
    assert {c.knowledge for c in done.report.cells if c.attack == "pgd"} == {"none", "bpda", "bpda_learned"}
    assert len(list((tmp_path / "cache").glob("fits/*.safetensors"))) == 1
    assert done.report.status == "complete"


@dataclass(frozen=True, kw_only=True)
class Pattern(Fitted):
    """Learns a pattern from one gradient through whatever it knows of the defence."""

    def run(self, view: EncoderView) -> Tensor:
        assert view.artifact is not None
        return view.inputs + view.artifact["delta"]

    def trainer(self, view: FitView) -> Trainer:
        return _OneGradient(view)


class _OneGradient:
    steps, batch = 1, 4

    def __init__(self, view: FitView) -> None:
        self._view = view
        self._delta = torch.zeros(1, 3, *view.encoder.input_size)

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        images = self._view.surrogate.batch(index)
        with torch.enable_grad():
            delta = self._delta.clone().requires_grad_(True)
            loss = self._view.encoder.features((images + delta).clamp(0, 1)).square().mean()
            (gradient,) = torch.autograd.grad(loss, delta)
        self._delta = self._view.threat.eps * gradient / gradient.abs().max()
        return {"loss": loss.detach()}

    def state(self) -> dict[str, Tensor]:
        return self.result()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._delta = state["delta"]

    def result(self) -> dict[str, Tensor]:
        return {"delta": self._delta}


def test_a_fitted_attack_learns_through_the_imitation(images: Path, tmp_path: Path) -> None:
    """It would otherwise be the undefended one under the name of an adaptive attacker."""
    pattern = attack(Pattern, access="encoder", fits=True)
    shields = [{"name": "blurs", "knowledge": ["oblivious", "bpda", "bpda_learned", "full"]}]
    settings: dict[str, Any] = {"samples": 4, "surrogate": SURROGATE, "surrogate_samples": 16}
    config = audit_config(images, attacks=["pattern"], defenses=shields, **settings)
    done = audit(config, tmp_path / "out", pattern, BLURS)
    fits = {cell.knowledge: cell.fit for cell in done.report.cells if cell.attack == "pattern"}
    digests = {level: fit.sha256 for level, fit in fits.items() if fit is not None}
    assert set(digests) == {"none", "oblivious", "bpda", "bpda_learned", "full"}
    assert digests["none"] == digests["oblivious"]
    assert len(set(digests.values())) == 4
    assert fits["bpda_learned"] is not None
    assert (fits["bpda_learned"].defense, fits["bpda_learned"].knowledge) == ("blurs", "bpda_learned")


# -- several looks


def _victim(spec: DefenseSpec, **shield: Any) -> DefendedEncoder:
    return DefendedEncoder(encoder=TOY.encoder, shield=Shield(spec=spec, defense=spec.build(), **shield))


def test_features_of_several_looks_are_their_mean() -> None:
    looks = Looks().apply(TOY.images)
    expected = torch.stack([TOY.encoder(looks[:, v]) for v in range(3)]).mean(dim=0)
    assert torch.allclose(_victim(LOOKS).features(TOY.images), expected, atol=1e-5)
    handle = EncoderHandle(TOY.encoder, Looks().apply, Meter())
    assert torch.allclose(handle.features(TOY.images), expected, atol=1e-5)
    tokens = handle.tokens(TOY.images, ["early"])["early"].spatial
    by_hand = torch.stack([TOY.encoder.tokens(looks[:, v], ["early"])["early"].spatial for v in range(3)]).mean(dim=0)
    assert torch.allclose(tokens, by_hand, atol=1e-5)


def test_bpda_hands_the_gradient_of_every_look_to_the_image() -> None:
    shield = Shield(spec=LOOKS, defense=Looks(), imitation=lambda images: 0.25 * images)
    looks = Looks().apply(TOY.images)
    for knowledge, slope in (("bpda", 1.0), ("bpda_learned", 0.25)):
        out, gradient = _seen(shield, knowledge, torch.ones(1))
        assert torch.equal(out, looks)
        pixels = TOY.images.clone().requires_grad_(True)
        small = F.interpolate(pixels, (12, 12), mode="bilinear", antialias=True, align_corners=False)
        (one,) = torch.autograd.grad(small.sum(), pixels)
        assert torch.allclose(gradient, 3 * slope * one, atol=1e-5)


@dataclass(frozen=True, kw_only=True)
class Spoils:
    """Two looks; one of a dark image's is broken."""

    def apply(self, images: Tensor) -> Tensor:
        dark = images.mean(dim=(1, 2, 3)) < 0.05
        broken = torch.where(dark.view(-1, 1, 1, 1), torch.full_like(images, torch.nan), images)
        return torch.stack([images, broken], dim=1)


def test_a_broken_look_breaks_that_image_alone() -> None:
    images = TOY.images[:3].clone()
    images[1] = 0
    features = _victim(defense(Spoils)).features(images)
    assert features[1].isnan().all()
    assert torch.allclose(features[[0, 2]], TOY.encoder(images[[0, 2]]), atol=1e-5)
    assert _victim(defense(Spoils)).features(torch.zeros(2, 3, 16, 16)).isnan().all()


@pytest.mark.parametrize("shape", [(3, 0, 3, 8, 8), (3, 2, 1, 8, 8), (2, 2, 3, 8, 8), (3, 3, 8)], ids=str)
def test_looks_of_another_shape_are_an_error(shape: tuple[int, ...]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        """Returns a shape."""

        def apply(self, images: Tensor) -> Tensor:
            return torch.zeros(shape)

    with pytest.raises(SampleError, match=r"defence odd turned images of shape \(3, 3, 16, 16\) into"):
        _victim(defense(Odd)).features(TOY.images[:3])


def test_an_audit_takes_several_looks(images: Path, tmp_path: Path) -> None:
    shields = [{"name": "looks", "knowledge": ["bpda", "full"]}]
    done = audit(audit_config(images, attacks=[PGD], defenses=shields, samples=8), tmp_path / "out", LOOKS)
    assert done.report.status == "complete"
    assert all(cell.n_errors == 0 for cell in done.report.cells)


# -- the optimizer's memory


def test_the_optimizer_remembers_what_it_was_told() -> None:
    weights = [torch.ones(3).requires_grad_(True) for _ in range(11)]
    one = torch.optim.Adam(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.arange(3.0)
    one.step()
    state = optimizer_state(one, weights, "adam.")
    copies = [weight.detach().clone().requires_grad_(True) for weight in weights]
    other = torch.optim.Adam(copies, lr=0.1)
    restore_optimizer(other, copies, "adam.", state)
    for optimizer, held in ((one, weights), (other, copies)):
        for place, weight in enumerate(held):
            weight.grad = torch.full((3,), float(place))
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))
