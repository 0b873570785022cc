"""The hardening of an encoder as the harness sets it up: the student, and the images it is attacked with, if any."""

import copy
import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder, state_sha256
from robustbench_x.encoders.loading import file_sha256, load_strictly
from robustbench_x.errors import ConfigError, SampleError
from robustbench_x.fitting.artifact import Artifact
from robustbench_x.fitting.ground import Ground, code_digest
from robustbench_x.fitting.job import decisive_params
from robustbench_x.fitting.loop import Show
from robustbench_x.hardening import AttackedHardening, Hardening, HardeningSpec, HardenView, split_inner
from robustbench_x.integrity import Seal
from robustbench_x.judge import admit
from robustbench_x.plugin import AttackSpec
from robustbench_x.randomness import SampleRandom, derive_seed
from robustbench_x.registry import Registry
from robustbench_x.result import InnerAttack
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import fresh_draw
from robustbench_x.views import EncoderHandle, EncoderView, ImageView, Meter

__all__ = ["HardenJob", "Inner", "find_inner"]

_NO_ATTACK = InnerAttack(name="none", params={})


@final
@dataclass(frozen=True, kw_only=True)
class Inner:
    """The attack whose images a hardening trains on, built, with what it learned of the original encoder."""

    spec: AttackSpec
    attack: Any
    artifact: Artifact | None = None

    @property
    def info(self) -> InnerAttack:
        """How an artefact names it."""
        learned = "" if self.artifact is None else self.artifact.sha256
        return InnerAttack(name=self.spec.name, params=decisive_params(self.spec, self.attack), artifact_sha256=learned)


def find_inner(registry: Registry, hardening: AttackedHardening, threat: ThreatModel) -> Inner:
    """The inner attack that `hardening` names, which knows no artefact yet.

    Raises:
        UnknownNameError: No attack has that name.
        ConfigError: It needs more than the encoder, has another norm, or a parameter of it is wrong.
    """
    asked = split_inner(hardening.inner)
    spec = registry.attacks[asked.name]
    if spec.access not in ("none", "encoder"):
        raise ConfigError(
            f"inner={hardening.inner}: {spec.name} needs access {spec.access}, but an encoder is hardened without any "
            "head; take an attack with access encoder"
        )
    if spec.aims:
        raise ConfigError(f"inner={hardening.inner}: {spec.name} aims at target images, and a hardening has none")
    if threat.norm not in spec.norms:
        raise ConfigError(
            f"inner={hardening.inner}: {spec.name} has no norm '{threat.norm}'; it has {', '.join(spec.norms)}"
        )
    return Inner(spec=spec, attack=spec.build(asked.params))


@final
@dataclass(frozen=True, kw_only=True)
class HardenJob:
    """Everything that hardening an encoder depends on; the one on `ground` is the teacher and stays as it is.

    `inner` is None for a hardening without an attack.
    """

    spec: HardeningSpec
    hardening: Hardening
    inner: Inner | None
    ground: Ground

    @property
    def name(self) -> str:
        """The hardening's."""
        return self.spec.name

    @property
    def untouchable(self) -> tuple[nn.Module, ...]:
        """The original encoder."""
        return self.ground.encoders

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter of the hardening."""
        return {p.name: getattr(self.hardening, p.name) for p in self.spec.params}

    def key(self) -> str:
        """See `Ground.key`; with the inner attack, its code, its parameters, what it learned, and the files read."""
        code = "" if self.inner is None else code_digest(self.inner.spec.factory.__module__)
        files = [file_sha256(path) for path in self.spec.reads(self.hardening)]
        return self.ground.key(self.spec, self.params, self._told.model_dump(mode="json"), code, files)

    def cache_key(self) -> str:
        """See `Ground.cache_key`."""
        return self.ground.cache_key(self.key())

    def run(self, checkpoint: Path | None, show: Show | None = None, *, every: float = 20.0) -> Artifact:
        """Trains, from the checkpoint where there is one; the tensors are the state dict of the hardened backbone.

        Raises:
            SampleError: The training broke down, or changed no weight.
            SourceError: What came of it is no complete, finite state dict of the backbone.
        """
        meter, key = Meter(), self.key()
        trained = self.ground.train(
            lambda: self.hardening.trainer(self.view(meter)),
            self.name,
            meter,
            key=key,
            checkpoint=checkpoint,
            show=show,
            every=every,
        )
        fresh = copy.deepcopy(self.ground.encoder.backbone)
        before = state_sha256(fresh.state_dict())
        load_strictly(fresh, trained.tensors, f"what {self.name} made of {self.ground.encoder.source}")
        if state_sha256(fresh.state_dict()) == before:
            raise SampleError("every weight is what it was before, so nothing was learned")
        provenance = self.ground.provenance(self.spec, self.params, key, trained, inner=self._told)
        return Artifact(trained.tensors, provenance)

    def view(self, meter: Meter) -> HardenView:
        """What the plugin is handed: a new student each time."""
        ground = self.ground
        student = copy.deepcopy(ground.encoder)
        for weight in student.backbone.parameters():
            weight.requires_grad_(weight.is_floating_point())

        def handle(encoder: Encoder) -> EncoderHandle:
            return EncoderHandle(encoder, lambda images: images, meter, bf16=ground.bf16)

        shown = handle(student)
        return HardenView(
            student=shown,
            backbone=student.backbone,
            teacher=handle(ground.encoder),
            surrogate=ground.surrogate(),
            threat=ground.threat,
            seed=ground.plugin_seed(self.name),
            device=ground.device,
            examples=lambda images, step: self._examples(student, shown, images, step),
        )

    @property
    def _told(self) -> InnerAttack:
        """The inner attack as the artefact names it."""
        return _NO_ATTACK if self.inner is None else self.inner.info

    def _examples(self, student: Encoder, shown: EncoderHandle, images: Tensor, step: int) -> Tensor:
        """See `HardenView`."""
        if self.inner is None:
            raise SampleError(f"{self.name} is registered with attacked=False, so there is no attack to make images")
        name, threat, clean = self.inner.spec.name, self.ground.threat, images.detach()
        where = f"the inner attack {name} at step {step}"
        seed = self.ground.plugin_seed(self.name)
        random = SampleRandom([derive_seed(seed, "inner", step, i) for i in range(len(clean))], device=clean.device)
        # The digest stands for the weights of this step, so that no attack takes them for those it cached.
        student.sha256 = hashlib.sha256(f"{self.ground.encoder.sha256}:{seed}:{step}".encode()).hexdigest()
        view = self._inner_view(self.inner, shown, clean, random)
        with _frozen(student), fresh_draw(random.seed, clean.device), torch.enable_grad():
            seal = Seal(student)
            try:
                candidates = self.inner.attack.run(view)
            except (Exception, SystemExit) as error:
                raise SampleError(f"{where} failed: {type(error).__name__}: {error}") from error
            finally:
                broken = seal.broken()
                if broken is not None:
                    seal.restore()
        if broken is not None:
            raise SampleError(f"{where}: {broken}")
        admitted = admit(candidates, clean, threat)
        wrong = [error for error in admitted.errors if error is not None]
        if wrong:
            raise SampleError(f"{where}, {len(wrong)} of {len(clean)} images: {wrong[0]}")
        return admitted.images

    def _inner_view(
        self, inner: Inner, shown: EncoderHandle, clean: Tensor, random: SampleRandom
    ) -> ImageView | EncoderView:
        shared: dict[str, Any] = {
            "inputs": clean.clone(),
            "threat": dataclasses.replace(self.ground.threat),
            "random": random,
            "exhaustive": True,
        }
        if inner.spec.access == "none":
            return ImageView(**shared)
        learned = None if inner.artifact is None else inner.artifact.tensors
        tensors = None if learned is None else {k: t.to(clean.device, copy=True) for k, t in learned.items()}
        return EncoderView(**shared, encoder=shown, artifact=tensors)


@contextmanager
def _frozen(student: nn.Module) -> Iterator[None]:
    """The student as an audit would show it: in eval mode, no weight asking for a gradient; all put back after."""
    modes = [(part, part.training) for part in student.modules()]
    weights = [(weight, weight.requires_grad, weight.grad) for weight in student.parameters()]
    student.eval().requires_grad_(False)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for weight, wanted, gradient in weights:
            weight.requires_grad_(wanted)
            weight.grad = gradient
