"""AnyAttack trained on a toy: its draws, what it learns, how it resumes, and where its artefact may be used."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder, Preprocessing, Tokens
from robustbench_x.errors import AttackError, ConfigError, SourceError
from robustbench_x.fitting import write_artifact
from robustbench_x.fitting.loop import batch_index, run_training
from robustbench_x.registry import load_registry
from robustbench_x.testing import ToyVictim, fit_toy, make_view, toy_victim
from robustbench_x.testing.toys import toy_job
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderHandle, EncoderView, ImagePool, Meter
from robustbench_x_attacks.anyattack.augment import deranged, others, random_views
from robustbench_x_attacks.anyattack.checkpoint import unpack
from robustbench_x_attacks.anyattack.decoder import OfficialDecoder

SPEC = load_registry().attacks["anyattack"]
THREAT = ThreatModel(eps=16 / 255)
TINY = {"steps": 4, "batch": 4, "k": 2}


class _Projection(nn.Module):
    """A random projection of the pixels to 32 numbers: other images have other directions."""

    layers: tuple[str, ...] = ()

    def __init__(self, width: int = 32, side: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(width, 3 * 8 * 8, generator=generator))
        self.side = side

    def pooled(self, images: Tensor) -> Tensor:
        return (F.adaptive_avg_pool2d(images, 8).flatten(1) - 0.5) @ self.weight.T

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        return []


def _victim(width: int = 32, side: int = 16) -> ToyVictim:
    toy = toy_victim()
    encoder = Encoder(
        source="projection", backbone=_Projection(width, side), preprocessing=Preprocessing(input_size=(side, side))
    )
    return replace(toy, encoder=encoder)


VICTIM = _victim()


def _view(victim: ToyVictim = VICTIM, learned: Mapping[str, Tensor] | None = None, **more: Any) -> EncoderView:
    view = make_view("encoder", victim, THREAT, artifact=learned)
    assert isinstance(view, EncoderView)
    return replace(view, **{"targets": victim.images.roll(1, dims=0), **more})


@torch.no_grad()
def _closeness(images: Tensor, view: EncoderView, encoder: Encoder = VICTIM.encoder) -> float:
    """Mean cosine to the targets' features."""
    assert view.targets is not None
    return float(F.cosine_similarity(encoder(images), encoder(view.targets), dim=1).mean())


# -- the draws


def test_a_derangement_has_no_fixed_point_and_misses_none() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(deranged(4, generator).tolist()) for _ in range(400)}
    assert len(drawn) == 9, "4 images have 9 derangements"
    assert all(sorted(order) == [0, 1, 2, 3] for order in drawn)
    assert all(order[i] != i for order in drawn for i in range(4))
    assert deranged(2, generator).tolist() == [1, 0]


def test_others_are_drawn_evenly_and_distinct_where_asked() -> None:
    generator, index = torch.Generator().manual_seed(0), torch.arange(3).repeat(2000)
    drawn = others(index, 3, generator, distinct=True)
    assert not (drawn == index).any()
    assert ((drawn == (index + 1) % 3).float().mean() - 0.5).abs() < 0.05
    free = others(index, 3, generator, distinct=False)
    assert ((free == index).float().mean() - 1 / 3).abs() < 0.05


def test_a_view_is_a_crop_mirrored_every_other_time_and_follows_from_its_generator() -> None:
    ramp = torch.linspace(0, 1, 33).view(1, 1, 1, 33).expand(400, 3, 33, 33).contiguous()
    state = torch.get_rng_state()
    views = random_views(ramp, torch.Generator().manual_seed(0))
    assert torch.equal(views, random_views(ramp, torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    slope = (views[:, 0, 16, 24] - views[:, 0, 16, 8]) / (ramp[0, 0, 16, 24] - ramp[0, 0, 16, 8])
    assert 0.4 < float((slope > 0).float().mean()) < 0.6
    assert float(slope.abs().max()) <= 1 + 1e-4
    assert 0.08**0.5 * 0.75**0.5 - 0.02 < float(slope.abs().min()) < 0.4, "8 % of the area, 3:4 at most"
    torch.testing.assert_close(views[:, 0, 5], views[:, 0, 28], msg="without a turn the rows stay alike")
    assert float(views.min()) >= 0
    assert float(views.max()) <= 1


def test_a_turn_goes_by_the_stated_angle_in_pixels() -> None:
    ramp = torch.linspace(0.2, 0.8, 41).view(1, 1, 1, 41).expand(300, 3, 61, 41).contiguous()
    views = random_views(ramp, torch.Generator().manual_seed(0), degrees=15)
    across = views[:, 0, 30, 24] - views[:, 0, 30, 16]
    down = views[:, 0, 34, 20] - views[:, 0, 26, 20]
    turned = (down / across).abs()
    assert 0.2 < float(turned.max()) <= float(torch.tensor(15.0).deg2rad().tan()) + 1e-3


# -- what it learns


@pytest.mark.parametrize(
    "params",
    [
        {"mode": "fixed"},
        {"mode": "compat"},
        {"mode": "fixed", "stage": "finetune", "loss": "cosine", "auxiliary": "toy"},
        {"mode": "compat", "stage": "finetune", "loss": "bicl"},
    ],
    ids=str,
)
def test_a_trained_decoder_leads_to_targets_it_never_saw(params: dict[str, object]) -> None:
    learned = fit_toy(SPEC, {"steps": 30, "batch": 12, "k": 2, **params}, VICTIM, THREAT)
    view = _view(learned=learned.tensors)
    meter = Meter()
    view = replace(view, encoder=EncoderHandle(VICTIM.encoder, lambda images: images, meter))
    images = SPEC.build(params).run(view)
    assert float(THREAT.overrun(images, view.inputs).max()) < 1e-6
    assert (meter.forwards, meter.backwards) == (len(images), 0), "one look at every target"
    noise = THREAT.noise(view.inputs, view.random)
    assert _closeness(images, view) > _closeness(noise, view) + 0.08


def test_the_encoder_that_it_was_fitted_on_reads_the_targets() -> None:
    """The same network at another size has the same digest: the one handed over for it comes first."""
    learned = fit_toy(SPEC, {"steps": 1, "batch": 12, "k": 1}, VICTIM, THREAT)
    meters = Meter(), Meter()
    handles = [EncoderHandle(VICTIM.encoder, lambda images: images, meter) for meter in meters]
    view = replace(_view(learned=learned.tensors), encoder=handles[0], partners=(handles[1],))
    SPEC.build({}).run(view)
    assert (meters[0].forwards, meters[1].forwards) == (0, len(view.inputs))


@pytest.mark.parametrize(("stage", "term"), [("pretrain", "info_nce"), ("finetune", "bicl")])
def test_the_loss_falls(stage: str, term: str) -> None:
    params = {
        "stage": stage, "steps": 25, "batch": 12, "k": 2, "augment": False, "temperature_start": 0.3,
        "temperature_end": 0.3,
    }  # fmt: skip
    job = toy_job(SPEC, params, VICTIM, THREAT)
    trainer = SPEC.build(params).trainer(job.view(Meter()))
    seen = []
    for number in range(25):
        index = batch_index(number, batch=12, pool=24, seed=0)
        seen.append(float(trainer.step(number, index)[term]))
    assert sum(seen[-5:]) < 0.85 * sum(seen[:5])


def test_every_auxiliary_encoder_adds_its_loss() -> None:
    params = {**TINY, "stage": "finetune", "loss": "cosine", "auxiliary": "a, b"}
    assert SPEC.partners(SPEC.build(params)) == ("a", "b")
    assert set(fit_toy(SPEC, params, VICTIM, THREAT).provenance.losses) == {"cosine", "cosine_aux1", "cosine_aux2"}


@pytest.mark.parametrize("mode", ["fixed", "compat"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_resumed_training_ends_with_the_same_tensors(stage: str, mode: str) -> None:
    params = {**TINY, "steps": 6, "stage": stage, "mode": mode, "restart": 4}
    whole = fit_toy(SPEC, params, VICTIM, THREAT)
    job = toy_job(SPEC, params, VICTIM, THREAT)

    attack, view = SPEC.build(params), job.view(Meter())
    first = attack.trainer(view)
    for number in range(3):
        first.step(number, batch_index(number, batch=4, pool=24, seed=view.seed))
    kept = {name: tensor.detach().clone() for name, tensor in first.state().items()}
    second = attack.trainer(view)
    second.restore(kept)
    for number in range(3, 6):
        second.step(number, batch_index(number, batch=4, pool=24, seed=view.seed))
    resumed = second.result()
    assert resumed.keys() == whole.tensors.keys()
    assert all(torch.equal(resumed[name], whole.tensors[name]) for name in resumed)
    assert "decoder.mean" in kept


def test_the_harness_resumes_it_from_its_checkpoint(tmp_path: Path) -> None:
    params, checkpoint = {**TINY, "steps": 5}, tmp_path / "partial.safetensors"
    view = toy_job(SPEC, params, VICTIM, THREAT).view(Meter())
    whole = run_training(lambda: SPEC.build(params).trainer(view), pool=24, seed=1, meter=Meter())

    class _Stops:
        """Dies in its fourth step."""

        def __init__(self) -> None:
            self.inner = SPEC.build(params).trainer(view)
            self.steps, self.batch = self.inner.steps, self.inner.batch
            self.state, self.restore, self.result = self.inner.state, self.inner.restore, self.inner.result

        def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
            if number == 3:
                raise KeyboardInterrupt("killed")
            terms: Mapping[str, Tensor] = self.inner.step(number, index)
            return terms

    with pytest.raises(KeyboardInterrupt, match="killed"):
        run_training(_Stops, pool=24, seed=1, meter=Meter(), checkpoint=checkpoint, every=0)
    resumed = run_training(
        lambda: SPEC.build(params).trainer(view), pool=24, seed=1, meter=Meter(), checkpoint=checkpoint, every=0
    )
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_the_recipe_of_each_mode() -> None:
    fixed, compat = (SPEC.build({"mode": mode, "steps": 300}).recipe for mode in ("fixed", "compat"))
    assert (fixed.temperature_steps, fixed.restart) == (300, 300)
    assert (compat.temperature_steps, compat.restart) == (10_000, 5_000)
    long = SPEC.build({"steps": 50_000, "decoder": "official"}).recipe
    assert (long.temperature_steps, long.restart, long.rate) == (10_000, 5_000, 1e-4)


# -- what it starts from, and where it may be used


def test_a_training_goes_on_from_an_artefact(tmp_path: Path) -> None:
    first = fit_toy(SPEC, TINY, VICTIM, THREAT)
    path = tmp_path / "first.safetensors"
    write_artifact(path, first)
    params = {**TINY, "stage": "finetune", "init": str(path), "steps": 1, "rate": 1e-12, "weight_decay": 0.0}
    second = fit_toy(SPEC, params, VICTIM, THREAT)
    weights = second.tensors["decoder.patterns"]
    torch.testing.assert_close(weights, first.tensors["decoder.patterns"], rtol=0, atol=1e-6)
    wider = _victim(width=48)
    with pytest.raises(AttackError, match=r"holds no compact decoder for embeddings of width 48 \(of another shape"):
        fit_toy(SPEC, params, wider, THREAT)


def test_released_weights_need_no_training(tmp_path: Path) -> None:
    with torch.device("meta"):
        wanted = OfficialDecoder().state_dict()
    state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in wanted.items()}
    state["final_conv.bias"] = torch.tensor([1.0, -1.0, 0.01])
    path = tmp_path / "coco_cos.pt"
    torch.save({"decoder_state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    victim = _victim(width=512, side=224)
    artifact = fit_toy(SPEC, {"weights": str(path)}, victim, THREAT)
    assert (artifact.provenance.steps, artifact.provenance.forwards) == (0, 0)
    inputs = torch.full((2, 3, 224, 224), 0.5)
    view = replace(_view(victim, artifact.tensors), inputs=inputs, targets=inputs)
    change = SPEC.build({"weights": str(path)}).run(view) - inputs
    expected = torch.tensor([16 / 255, -16 / 255, 0.01]).view(1, 3, 1, 1).expand_as(change)
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)
    smaller = replace(view, threat=ThreatModel(eps=4 / 255))
    assert float((SPEC.build().run(smaller) - inputs).abs().max()) == pytest.approx(4 / 255, abs=1e-6)
    with pytest.raises(AttackError, match="this encoder's have width 32"):
        fit_toy(SPEC, {"weights": str(path)}, VICTIM, THREAT)
    with pytest.raises(SourceError, match=r"nowhere.pt: there is no such file"):
        fit_toy(SPEC, {"weights": str(tmp_path / "nowhere.pt")}, victim, THREAT)


def test_the_embeddings_come_from_the_encoder_it_was_fitted_on() -> None:
    learned = fit_toy(SPEC, TINY, VICTIM, THREAT).tensors
    stranger = toy_victim()
    with pytest.raises(AttackError, match=f"sha256 {VICTIM.encoder.sha256}, which it was fitted on"):
        SPEC.build().run(_view(stranger, learned))
    surrogate = EncoderHandle(VICTIM.encoder, lambda images: images, Meter())
    transferred = SPEC.build().run(_view(stranger, learned, partners=(surrogate,)))
    assert torch.equal(transferred, SPEC.build().run(_view(learned=learned)))


def test_noise_for_images_of_another_size_is_resized_within_the_budget() -> None:
    learned = fit_toy(SPEC, TINY, VICTIM, THREAT).tensors
    inputs = VICTIM.images.repeat(1, 1, 2, 3)
    view = _view(learned=learned, inputs=inputs)
    images = SPEC.build().run(view)
    assert images.shape == inputs.shape
    assert 0 < float((images - inputs).abs().max()) <= THREAT.eps + 1e-6


def test_what_is_missing_is_said() -> None:
    with pytest.raises(AttackError, match="aims at a target image per sample, and it was handed none"):
        SPEC.build().run(_view(targets=None))
    with pytest.raises(AttackError, match="needs an artefact with a trained decoder"):
        SPEC.build().run(_view())
    nothing = replace(_view(targets=None), threat=ThreatModel(eps=0))
    assert torch.equal(SPEC.build().run(nothing), nothing.inputs)


def test_two_surrogate_images_are_needed() -> None:
    view = toy_job(SPEC, TINY, VICTIM, THREAT).view(Meter())
    one = replace(view, surrogate=ImagePool(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)))
    with pytest.raises(AttackError, match="needs two surrogate images at least, there are 1"):
        SPEC.build(TINY).trainer(one)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"batch": 1}, "batch=1 must be at least 2"),
        ({"rate": 0.0}, "rate=0.0 must be positive"),
        ({"weight_decay": -1}, "weight_decay=-1.0 must not be negative"),
        ({"auxiliary": "a"}, "auxiliary encoders belong to stage=finetune"),
        ({"weights": "a.pt", "init": "b.pt"}, "weights are used as they are"),
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^anyattack: {message}"):
        SPEC.build(params)


def test_an_official_decoder_for_another_encoder_is_refused() -> None:
    with pytest.raises(AttackError, match="width 32; use decoder=compact"):
        fit_toy(SPEC, {**TINY, "decoder": "official"}, VICTIM, THREAT)


def test_an_artefact_holds_the_decoder_and_who_reads() -> None:
    learned = unpack(fit_toy(SPEC, TINY, VICTIM, THREAT).tensors)
    assert learned.encoder_sha256 == VICTIM.encoder.sha256
    assert learned.decoder.size == (16, 16)
