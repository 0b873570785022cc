"""What every attack must keep. Each check takes a spec and, for slow attacks, the parameters to run it with."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from robustbench_x.integrity import Seal
from robustbench_x.judge import admit
from robustbench_x.plugin import AttackSpec, check_spec
from robustbench_x.stats import mcnemar_exact
from robustbench_x.testing.toys import ToyVictim, fit_toy, make_view, toy_victim
from robustbench_x.threat import Norm, ThreatModel

__all__ = ["ATTACK_CHECKS"]

_BUDGETS: dict[Norm, tuple[float, float, float]] = {
    "linf": (2 / 255, 8 / 255, 32 / 255),
    "l2": (0.25, 1.0, 4.0),
    "patch": (0.02, 0.1, 0.3),
}
_TOLERANCE = 1e-6
Params = Mapping[str, Any]
_DEFAULTS: Params = {}


def says_what_it_is(spec: AttackSpec, params: Params = _DEFAULTS) -> None:
    """Spec well-formed, every parameter explained, the class documented."""
    check_spec(spec)
    silent = [p.name for p in spec.params if not p.help]
    assert not silent, f"{spec.name}: parameters without help: {', '.join(silent)}"
    assert (spec.factory.__doc__ or "").strip(), f"{spec.name}: its class has no docstring"
    assert spec.effective(params).keys() == {p.name for p in spec.params}


def keeps_shape_and_budget(spec: AttackSpec, params: Params = _DEFAULTS) -> None:
    """Same shape, dtype and device; finite; inside the budget where it claims to spend one."""
    victim = toy_victim()
    for norm in spec.norms:
        threat = ThreatModel(norm=norm, eps=_BUDGETS[norm][1])
        images = _run(spec, params, victim, threat)
        where = f"{spec.name} with {threat}"
        assert images.shape == victim.images.shape, f"{where} returned shape {tuple(images.shape)}"
        assert images.dtype == victim.images.dtype, f"{where} returned {images.dtype}"
        assert images.device == victim.images.device, f"{where} returned images on {images.device}"
        assert not images.requires_grad, f"{where} returned images that carry a graph"
        admitted = admit(images, victim.images, threat)
        assert admitted.errors == [None] * len(images), f"{where}: {admitted.errors}"
        overrun = float(admitted.overrun.max())
        assert not spec.budget or overrun <= _TOLERANCE, f"{where} leaves its budget by {overrun:.3g}"


def repeats_by_seed(spec: AttackSpec, params: Params = _DEFAULTS) -> None:
    """Two runs from one seed agree, whatever the global generators were doing."""
    if not spec.deterministic:
        return
    victim, threat = toy_victim(), _middle(spec)
    first = _run(spec, params, victim, threat, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(991)
        torch.rand(7)
        second = _run(spec, params, victim, threat, seed=3)
    assert torch.equal(first, second), f"{spec.name}: two runs from one seed differ"


def leaves_everything_alone(spec: AttackSpec, params: Params = _DEFAULTS) -> None:
    """Weights, buffers, modes, gradients, hooks, inputs and the global generator are as they were."""
    victim, threat = toy_victim(), _middle(spec)
    seal, before = Seal(victim.encoder, victim.head), torch.get_rng_state()
    artifact = _learned(spec, params, victim, threat)
    assert seal.broken() is None, f"{spec.name}, trained: {seal.broken()}"
    assert torch.equal(torch.get_rng_state(), before), f"{spec.name} moved the global generator while it trained"
    view = make_view(spec.access, victim, threat, artifact=artifact)
    inputs, state = view.inputs.clone(), torch.get_rng_state()
    spec.build(params).run(view)
    assert seal.broken() is None, f"{spec.name}: {seal.broken()}"
    assert torch.equal(view.inputs, inputs), f"{spec.name} wrote to its inputs"
    assert torch.equal(torch.get_rng_state(), state), f"{spec.name} moved the global generator"
    assert torch.is_grad_enabled(), f"{spec.name} switched gradients off"


def changes_nothing_at_zero(spec: AttackSpec, params: Params = _DEFAULTS) -> None:
    """With eps = 0 the projected images are the clean ones."""
    victim = toy_victim()
    for norm in spec.norms:
        threat = ThreatModel(norm=norm, eps=0.0)
        images = threat.project(_run(spec, params, victim, threat), victim.images)
        assert torch.equal(images, victim.images), f"{spec.name}: eps=0 ({norm}) changes images"


def never_helps_with_more(spec: AttackSpec, params: Params = _DEFAULTS) -> None:
    """A larger budget does not fool significantly fewer samples (McNemar, exact, 5 %)."""
    victim = toy_victim()
    for norm in spec.norms:
        fooled = [_fooled(spec, params, victim, ThreatModel(norm=norm, eps=eps)) for eps in _BUDGETS[norm]]
        for smaller, larger in itertools.pairwise(fooled):
            lost, gained = int((smaller & ~larger).sum()), int((larger & ~smaller).sum())
            worse = lost > gained and mcnemar_exact(lost, gained) < 0.05
            counts = [int(f.sum()) for f in fooled]
            assert not worse, f"{spec.name} ({norm}): fools {counts} at {_BUDGETS[norm]}"


def works_on_one_image(spec: AttackSpec, params: Params = _DEFAULTS) -> None:
    """A batch of one is a batch."""
    whole = toy_victim()
    victim = ToyVictim(encoder=whole.encoder, head=whole.head, images=whole.images[:1], labels=whole.labels[:1])
    images = _run(spec, params, victim, _middle(spec))
    assert images.shape == victim.images.shape, f"{spec.name}: one image became {tuple(images.shape)}"


ATTACK_CHECKS: tuple[Callable[..., None], ...] = (
    says_what_it_is,
    keeps_shape_and_budget,
    repeats_by_seed,
    leaves_everything_alone,
    changes_nothing_at_zero,
    never_helps_with_more,
    works_on_one_image,
)


def _run(spec: AttackSpec, params: Params, victim: ToyVictim, threat: ThreatModel, *, seed: int = 0) -> Tensor:
    artifact = _learned(spec, params, victim, threat, seed=seed)
    images: Tensor = spec.build(params).run(make_view(spec.access, victim, threat, seed=seed, artifact=artifact))
    return images


def _learned(
    spec: AttackSpec, params: Params, victim: ToyVictim, threat: ThreatModel, *, seed: int = 0
) -> dict[str, Tensor] | None:
    """What a fitted attack learned, as the harness hands it over; None for the others and at a budget of zero."""
    if not spec.fits or threat.radius == 0:
        return None
    return fit_toy(spec, params, victim, threat, seed=seed).tensors


def _middle(spec: AttackSpec) -> ThreatModel:
    norm = spec.norms[0]
    return ThreatModel(norm=norm, eps=_BUDGETS[norm][1])


def _fooled(spec: AttackSpec, params: Params, victim: ToyVictim, threat: ThreatModel) -> Tensor:
    images = admit(_run(spec, params, victim, threat), victim.images, threat).images
    with torch.no_grad():
        wrong: Tensor = victim.logits(images).argmax(dim=1) != victim.labels
    return wrong
