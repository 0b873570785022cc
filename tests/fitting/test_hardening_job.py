"""Hardening as the harness runs it: the inner attack is never trusted, the original is never touched."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import state_sha256
from robustbench_x.errors import ConfigError, SampleError, SourceError, UnknownNameError
from robustbench_x.fitting.harden import HardenJob, Inner, find_inner
from robustbench_x.hardening import HardeningSpec, HardenView
from robustbench_x.integrity import Seal
from robustbench_x.plugin import AttackSpec, Fitted, Trainer, param
from robustbench_x.registry import load_registry
from robustbench_x.testing import ToyVictim, toy_hardening, toy_victim
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderView, FitView, Meter

THREAT = ThreatModel(eps=8 / 255)
REGISTRY = load_registry()
FARE = REGISTRY.hardenings["fare"]
SHORT = {"steps": 3, "batch": 6}


def inner(factory: type, **spec: Any) -> Inner:
    """A planted inner attack, built."""
    known: dict[str, Any] = {"summary": "planted", "source": "planted", "access": "encoder"}
    made = AttackSpec(name=factory.__name__.lower(), factory=factory, **{**known, **spec})
    return Inner(spec=made, attack=made.build())


def job(attack: Inner, victim: ToyVictim | None = None, threat: ThreatModel = THREAT) -> HardenJob:
    return toy_hardening(FARE, SHORT, victim or toy_victim(), threat, inner=attack)


@dataclass(frozen=True, kw_only=True)
class Overruns:
    """Leaves budget and range."""

    def run(self, view: EncoderView) -> Tensor:
        return view.inputs * -9 + 4


@dataclass(frozen=True, kw_only=True)
class Broken:
    """NaN in two images."""

    def run(self, view: EncoderView) -> Tensor:
        images = view.inputs.clone()
        images[:2] = torch.nan
        return images


@dataclass(frozen=True, kw_only=True)
class Shrinks:
    def run(self, view: EncoderView) -> Tensor:
        return view.inputs[:-1]


@dataclass(frozen=True, kw_only=True)
class Raises:
    def run(self, view: EncoderView) -> Tensor:
        raise ValueError("no idea")


@dataclass(frozen=True, kw_only=True)
class Leaves:
    def run(self, view: EncoderView) -> Tensor:
        raise SystemExit(0)


@dataclass(frozen=True, kw_only=True)
class Tampers:
    """Blanks the student, and makes its gradients vanish for good."""

    def run(self, view: EncoderView) -> Tensor:
        net = view.encoder._encoder
        for weight in net.parameters():
            weight.data.zero_()
        net.train()
        return view.inputs


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Switches gradients off, writes to its inputs and draws from the global generator."""

    def run(self, view: EncoderView) -> Tensor:
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        moved = view.inputs + 0.01
        view.inputs.zero_()
        return moved


def test_images_outside_the_budget_are_projected() -> None:
    victim = toy_victim()
    made = job(inner(Overruns), victim).view(Meter()).examples(victim.images, 0)
    assert float(THREAT.distance(made, victim.images).max()) == pytest.approx(THREAT.eps)
    assert torch.equal(made, THREAT.project(victim.images * -9 + 4, victim.images))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Broken, "the inner attack broken at step 0, 2 of 6 images: the attack returned NaN or infinite pixels"),
        (Shrinks, r"the attack returned shape \(5, 3, 16, 16\), expected \(6, 3, 16, 16\)"),
        (Raises, "the inner attack raises at step 0 failed: ValueError: no idea"),
        (Leaves, "the inner attack leaves at step 0 failed: SystemExit: 0"),
        (Tampers, "the inner attack tampers at step 0: the attack changed the victim's modes"),
    ],
)
def test_a_failing_or_lying_inner_attack_ends_the_training(factory: type, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        job(inner(factory)).run(None)


def test_a_tampering_attack_leaves_no_trace_on_the_student() -> None:
    view = job(inner(Tampers)).view(Meter())
    before = state_sha256(view.backbone.state_dict())
    with pytest.raises(SampleError, match="changed the victim's modes"):
        view.examples(toy_victim().images, 0)
    assert state_sha256(view.backbone.state_dict()) == before
    assert all(weight.requires_grad for weight in view.backbone.parameters())
    assert not any(part.training for part in view.backbone.modules())


def test_what_an_attack_does_to_the_process_does_not_reach_the_training() -> None:
    victim = toy_victim()
    images = victim.images.clone()
    view = job(inner(Switches), victim).view(Meter())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = view.examples(images, 0)
        drawn = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(drawn, torch.rand(1))
    assert torch.is_grad_enabled()
    assert torch.equal(images, victim.images)
    assert torch.equal(made, THREAT.project(images + 0.01, images))


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Notes what it is shown."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def run(self, view: EncoderView) -> Tensor:
        net = view.encoder._encoder
        self.seen.append(
            {
                "grad": any(weight.requires_grad for weight in net.parameters()),
                "held": any(weight.grad is not None for weight in net.parameters()),
                "training": any(part.training for part in net.modules()),
                "sha256": view.encoder.sha256,
                "exhaustive": view.exhaustive,
                "first": float(view.random.uniform((1,))[0]),
            }
        )
        return view.inputs


def test_the_student_is_shown_as_an_audit_would_show_it() -> None:
    Looks.seen.clear()
    victim = toy_victim()
    view = job(inner(Looks), victim).view(Meter())
    view.student.features(victim.images).square().sum().backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for weight in view.backbone.parameters()]
    view.backbone.train()
    for step in (0, 1, 1):
        view.examples(victim.images, step)
    first, second, again = Looks.seen
    assert (first["grad"], first["held"], first["training"], first["exhaustive"]) == (False, False, False, True)
    assert len({victim.encoder.sha256, first["sha256"], second["sha256"]}) == 3, "a cache would mistake it"
    assert first["first"] != second["first"]
    assert second == again
    assert all(weight.grad is kept for weight, kept in zip(view.backbone.parameters(), gradients, strict=True))
    assert all(part.training for part in view.backbone.modules())


def test_the_original_and_its_caller_s_encoder_are_untouched() -> None:
    victim = toy_victim()
    seal = Seal(victim.encoder)
    made = job(find_inner(REGISTRY, FARE.build(), THREAT), victim).run(None)
    assert seal.broken() is None
    assert made.sha256 != victim.encoder.sha256


@dataclass(frozen=True, kw_only=True)
class Learns(Fitted):
    """Is trained first; adds what it learned, which is the mean of the clean features."""

    size: float = param(0.01, "size")

    def trainer(self, view: FitView) -> Trainer:
        return _Mean(view)

    def run(self, view: EncoderView) -> Tensor:
        assert view.artifact is not None
        return view.inputs + self.size * view.artifact["mean"].sign()


class _Mean:
    steps, batch = 1, 4

    def __init__(self, view: FitView) -> None:
        self._view, self._mean = view, torch.zeros(1)

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        self._mean = self._view.encoder.features(self._view.surrogate.batch(index)).mean().detach()
        return {"mean": self._mean}

    def state(self) -> dict[str, Tensor]:
        return {"mean": self._mean}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._mean = state["mean"]

    def result(self) -> dict[str, Tensor]:
        return {"mean": self._mean}


def test_an_inner_attack_that_is_trained_first_gets_what_it_learned_of_the_original() -> None:
    made = job(inner(Learns, fits=True))
    assert made.inner is not None
    assert made.inner.artifact is not None
    assert made.inner.artifact.provenance.encoder_sha256 == toy_victim().encoder.sha256
    artifact = made.run(None)
    told = artifact.provenance.inner
    assert told is not None
    assert (told.name, told.params, told.artifact_sha256) == ("learns", {"size": 0.01}, made.inner.artifact.sha256)


def test_the_artefact_says_how_it_was_made_and_what_it_cost() -> None:
    made = toy_hardening(FARE, {**SHORT, "inner": "embed?loss=l2&steps=2"}, toy_victim()).run(None)
    said = made.provenance
    assert (said.plugin, said.encoder, said.steps, said.defense) == ("fare", "toy", 3, "none")
    assert said.inner is not None
    assert (said.inner.name, said.inner.params["steps"], said.inner.params["loss"]) == ("embed", 2, "l2")
    assert said.params["inner"] == "embed?loss=l2&steps=2"
    # Per step and image: the attack looks at the clean image, twice with gradient, and once at the end; then the
    # teacher, and the student with gradient.
    assert (said.forwards, said.backwards) == (3 * 6 * (1 + 2 + 1 + 1 + 1), 3 * 6 * (2 + 1))


def test_the_key_covers_the_inner_attack() -> None:
    def key(**params: Any) -> str:
        return toy_hardening(FARE, {**SHORT, **params}, toy_victim()).key()

    asked = [key(), key(inner="embed"), key(inner="embed?steps=4"), key(rate=1e-3)]
    assert len(set(asked)) == 4
    assert key() == asked[0]
    learned = job(inner(Learns, fits=True))
    assert learned.inner is not None
    assert learned.inner.artifact is not None
    other = learned.inner.artifact._replace(tensors={"mean": torch.ones(1)})
    assert dataclasses.replace(learned, inner=dataclasses.replace(learned.inner, artifact=other)).key() != learned.key()


def test_any_encoder_level_attack_will_do_and_no_other() -> None:
    threat = ThreatModel(eps=0.5, norm="l2")
    for name in ("embed?steps=1", "noise"):
        made = toy_hardening(FARE, {**SHORT, "inner": name}, toy_victim(), threat).run(None)
        assert made.provenance.threat.norm == "l2"
    with pytest.raises(ConfigError, match="inner=pgd: pgd needs access whitebox, but an encoder is hardened without"):
        find_inner(REGISTRY, FARE.build({"inner": "pgd"}), THREAT)
    with pytest.raises(ConfigError, match="inner=advencoder: advencoder has no norm 'l2'; it has linf, patch"):
        find_inner(REGISTRY, FARE.build({"inner": "advencoder"}), threat)
    with pytest.raises(ConfigError, match="embed has no parameter 'stepps'; did you mean steps"):
        find_inner(REGISTRY, FARE.build({"inner": "embed?stepps=2"}), THREAT)
    with pytest.raises(UnknownNameError, match="unknown attack 'embd'; did you mean embed"):
        find_inner(REGISTRY, FARE.build({"inner": "embd"}), THREAT)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A hardening whose result is planted."""

    inner: str = param("noise", "attack")
    kind: str = param("", "what is wrong")

    def trainer(self, view: HardenView) -> Trainer:
        return _Plants(view.backbone, self.kind)


class _Plants:
    steps, batch = 1, 2

    def __init__(self, net: nn.Module, kind: str) -> None:
        self._held, self._kind = {k: t.detach().clone() for k, t in net.state_dict().items()}, kind

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        return {"adv": torch.zeros(())}

    def state(self) -> dict[str, Tensor]:
        return self._held

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._held = dict(state)

    def result(self) -> dict[str, Tensor]:
        if self._kind == "missing":
            del self._held["early.0.weight"]
        if self._kind == "nan":
            self._held["late.0.bias"][0] = torch.nan
        if self._kind == "more":
            self._held["head.weight"] = torch.ones(2)
        return self._held


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("", SampleError, "every weight is what it was before, so nothing was learned"),
        ("missing", SourceError, "what planted made of toy: .*1 missing: early.0.weight"),
        ("nan", SourceError, "1 not finite: late.0.bias"),
        ("more", SourceError, "1 unexpected: head.weight"),
    ],
)
def test_a_result_that_is_no_hardened_backbone_is_refused(kind: str, error: type[Exception], message: str) -> None:
    spec = HardeningSpec(name="planted", summary="s", factory=Planted, source="tests")
    with pytest.raises(error, match=message):
        toy_hardening(spec, {"kind": kind}, toy_victim(), THREAT).run(None)
