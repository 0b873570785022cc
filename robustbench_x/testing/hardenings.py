"""What every hardening must keep. Each check takes a spec and, for slow ones, the parameters to run it with."""

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from robustbench_x.encoders.loading import load_strictly
from robustbench_x.fitting.artifact import Artifact
from robustbench_x.fitting.ground import Pool
from robustbench_x.fitting.harden import HardenJob, Inner, find_inner
from robustbench_x.fitting.job import FitJob
from robustbench_x.hardening import Hardening, HardeningSpec, HardenView
from robustbench_x.integrity import Seal
from robustbench_x.plugin import Trainer
from robustbench_x.registry import load_registry
from robustbench_x.testing.toys import ToyVictim, toy_ground, toy_victim
from robustbench_x.threat import ThreatModel

__all__ = ["HARDENING_CHECKS", "toy_hardening"]

Params = Mapping[str, Any]
_DEFAULTS: Params = {}
_THREAT = ThreatModel(eps=8 / 255)


def toy_hardening(
    spec: HardeningSpec,
    params: Params,
    victim: ToyVictim,
    threat: ThreatModel = _THREAT,
    *,
    seed: int = 0,
    inner: Inner | None = None,
) -> HardenJob:
    """The hardening of the toy encoder on 24 blurred random images; `inner` stands in for the attack it names.

    One without an attack gets neither images nor a budget.
    """
    hardening = spec.build(params)
    ground = toy_ground(victim, threat if spec.attacked else ThreatModel(eps=0), seed=seed)
    if not spec.attacked:
        ground = dataclasses.replace(ground, pool=Pool.empty(victim.encoder.input_size))
        return HardenJob(spec=spec, hardening=hardening, inner=None, ground=ground)
    inner = inner or find_inner(load_registry(), hardening, threat)
    if inner.spec.fits and inner.artifact is None:
        learned = FitJob(spec=inner.spec, attack=inner.attack, ground=ground).run(None)
        inner = Inner(spec=inner.spec, attack=inner.attack, artifact=learned)
    return HardenJob(spec=spec, hardening=hardening, inner=inner, ground=ground)


def says_what_it_is(spec: HardeningSpec, params: Params = _DEFAULTS) -> None:
    """Every parameter explained, the class documented, the default budget and inner attack ones that exist."""
    silent = [p.name for p in spec.params if not p.help]
    assert not silent, f"{spec.name}: parameters without help: {', '.join(silent)}"
    assert (spec.factory.__doc__ or "").strip(), f"{spec.name}: its class has no docstring"
    assert spec.effective(params).keys() == {p.name for p in spec.params}
    if spec.attacked:
        find_inner(load_registry(), spec.build(), _THREAT)


def returns_a_hardened_backbone(spec: HardeningSpec, params: Params = _DEFAULTS) -> None:
    """A complete, finite state dict of the encoder, with other weights."""
    artifact, original = _run(spec, params), toy_victim().encoder
    assert artifact.sha256 != original.sha256, f"{spec.name} leaves the encoder as it was"
    loaded = copy.deepcopy(original.backbone)
    load_strictly(loaded, artifact.tensors, spec.name)


def repeats_by_seed(spec: HardeningSpec, params: Params = _DEFAULTS) -> None:
    """Two runs from one seed agree to the bit, whatever the global generators were doing; another seed differs, if
    and only if there is an attack."""
    first = _run(spec, params, seed=3).sha256
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        torch.rand(7)
        again = _run(spec, params, seed=3).sha256
    assert first == again, f"{spec.name}: one seed gives two results"
    other = _run(spec, params, seed=4).sha256
    if spec.attacked:
        assert first != other, f"{spec.name}: two seeds give one result"
    else:
        assert first == other, f"{spec.name}: the seed decides, but attacked=False says that it looks at weights alone"


def resumes_to_the_bit(spec: HardeningSpec, params: Params = _DEFAULTS) -> None:
    """Killed before its last step and resumed, it ends with the tensors of an uninterrupted run.

    One without an attack may have a single step; it is then killed after it, before the result is stored.
    """
    job = toy_hardening(spec, params, toy_victim())
    whole = job.run(None)
    single = whole.provenance.steps == 1 and not spec.attacked
    mortal = dataclasses.replace(job, hardening=_Mortal(job.hardening, at=whole.provenance.steps - (not single)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "partial.safetensors"
        with contextlib.suppress(_KilledError):
            mortal.run(checkpoint, every=0.0)
        assert checkpoint.exists(), f"{spec.name}: a single step leaves nothing to resume; check it with more"
        resumed = job.run(checkpoint, every=0.0)
    assert whole.sha256 == resumed.sha256, f"{spec.name}: a resumed run ends elsewhere than a whole one"


def leaves_the_original_alone(spec: HardeningSpec, params: Params = _DEFAULTS) -> None:
    """Weights, buffers, modes, gradients and hooks of the original encoder are untouched."""
    victim = toy_victim()
    seal = Seal(victim.encoder)
    toy_hardening(spec, params, victim).run(None)
    assert seal.broken() is None, f"{spec.name}: {seal.broken()}"


HARDENING_CHECKS: tuple[Callable[..., None], ...] = (
    says_what_it_is,
    returns_a_hardened_backbone,
    repeats_by_seed,
    resumes_to_the_bit,
    leaves_the_original_alone,
)


def _run(spec: HardeningSpec, params: Params, *, seed: int = 0) -> Artifact:
    return toy_hardening(spec, params, toy_victim(), seed=seed).run(None)


class _KilledError(Exception):
    """Stands for a kill."""


@final
class _Mortal:
    """A hardening that is killed at one step."""

    def __init__(self, hardening: Hardening, *, at: int) -> None:
        self._hardening, self._at = hardening, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hardening, name)

    def trainer(self, view: HardenView) -> Trainer:
        """Its training, which dies."""
        return _Dying(self._hardening.trainer(view), self._at)


@final
class _Dying:
    """A trainer that is killed at one step."""

    def __init__(self, trainer: Trainer, at: int) -> None:
        self.steps, self.batch = trainer.steps, trainer.batch
        self.state, self.restore, self.result = trainer.state, trainer.restore, trainer.result
        self._step, self._at = trainer.step, at

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """Its step, or the end."""
        if number == self._at:
            raise _KilledError
        return self._step(number, index)
