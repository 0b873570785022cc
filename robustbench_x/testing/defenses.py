"""What every defence must keep."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from robustbench_x.engine.supply import find_defense
from robustbench_x.fitting.defense_job import CALIBRATION, DefenseJob
from robustbench_x.plugin import Defense, DefenseSpec, check_spec
from robustbench_x.testing.toys import toy_ground, toy_victim
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import Shield, fresh_draw, perceive
from robustbench_x.views import EncoderHandle, Meter

__all__ = ["DEFENSE_CHECKS"]

_CPU = torch.device("cpu")


def says_what_it_is(spec: DefenseSpec) -> None:
    """Spec well-formed, every parameter explained, the class documented."""
    check_spec(spec)
    silent = [p.name for p in spec.params if not p.help]
    assert not silent, f"{spec.name}: parameters without help: {', '.join(silent)}"
    assert (spec.factory.__doc__ or "").strip(), f"{spec.name}: its class has no docstring"


def returns_images(spec: DefenseSpec) -> None:
    """Finite images in [0, 1], same batch, channels, dtype and device, at any size and batch."""
    defense, images = _build(spec), toy_victim().images
    for batch in (images, images[:1], images[..., :27, :21]):
        out = _apply(defense, batch)
        fits = out.ndim in (4, 5) and (out.shape[0], out.shape[-3]) == tuple(batch.shape[:2])
        assert fits, f"{spec.name}: {tuple(batch.shape)} became {tuple(out.shape)}"
        assert (out.dtype, out.device) == (batch.dtype, batch.device), f"{spec.name} returned {out.dtype}, {out.device}"
        assert out.isfinite().all(), f"{spec.name} returned NaN or infinity"
        assert out.min() >= 0, f"{spec.name} returned pixels below 0: {float(out.min()):.3g}"
        assert out.max() <= 1, f"{spec.name} returned pixels above 1: {float(out.max()):.3g}"


def treats_images_alone(spec: DefenseSpec) -> None:
    """One image's result does not depend on the others of its batch."""
    if spec.stochastic:
        return
    defense, images = _build(spec), toy_victim().images
    together = _apply(defense, images)
    alone = torch.cat([_apply(defense, image[None]) for image in images])
    gap = float((together - alone).abs().max())
    assert gap < 1e-5, f"{spec.name}: alone and in a batch differ by {gap:.3g}"


def is_as_random_as_declared(spec: DefenseSpec) -> None:
    """Deterministic ones repeat exactly and draw nothing; random ones vary between seeds and repeat on one."""
    defense, images = _build(spec), toy_victim().images
    first, again, other = (_apply(defense, images, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again), f"{spec.name}: one seed gives two results"
    assert torch.equal(first, other) != spec.stochastic, f"{spec.name}: declared stochastic={spec.stochastic}"
    if not spec.stochastic:
        state = torch.get_rng_state()
        defense.apply(images)
        assert torch.equal(torch.get_rng_state(), state), f"{spec.name} draws from the global generator"


def leaves_inputs_alone(spec: DefenseSpec) -> None:
    """The images it is given are not written to."""
    images = toy_victim().images
    copy = images.clone()
    _apply(_build(spec), copy)
    assert torch.equal(images, copy), f"{spec.name} wrote to its inputs"


def lets_gradients_through(spec: DefenseSpec) -> None:
    """At every level it lists, each sample gets a finite, non-zero gradient at the deployed output's value."""
    images = toy_victim().images
    # An imitation is the harness's; here the identity stands for one.
    shield = Shield(spec=spec, defense=_build(spec), imitation=lambda pixels: pixels)
    for knowledge in spec.knowledge:
        if knowledge == "oblivious":
            continue
        pixels = (0.05 + 0.9 * images).requires_grad_(True)
        with fresh_draw(5, _CPU):
            seen = perceive(shield, knowledge)(pixels)
        with fresh_draw(5, _CPU):
            real = shield.apply(pixels.detach())
        gap = float((seen.detach() - real).abs().max())
        assert gap < 1e-5, f"{spec.name} ({knowledge}): the attacker sees values {gap:.3g} off the deployed ones"
        (gradient,) = torch.autograd.grad(seen.square().sum(), pixels)
        sizes = gradient.flatten(1).abs().amax(dim=1)
        assert sizes.isfinite().all(), f"{spec.name} ({knowledge}): a gradient is not finite"
        assert (sizes > 0).all(), f"{spec.name} ({knowledge}): {int((sizes == 0).sum())} gradients are zero"


def scores_images(spec: DefenseSpec) -> None:
    """A detector passes images as they are and scores each alone, with a finite score and gradient; others need not."""
    if not spec.detects:
        return
    victim, detector = toy_victim(), _build(spec)
    encoder = EncoderHandle(victim.encoder, lambda images: images, Meter())
    pixels = (0.05 + 0.9 * victim.images).requires_grad_(True)
    scores = detector.score(pixels, encoder)  # type: ignore[attr-defined]  # it detects
    assert scores.shape == (len(pixels),), f"{spec.name} scored {len(pixels)} images as {tuple(scores.shape)}"
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert scores.isfinite().all(), f"{spec.name}: a score is not finite"
    assert gradient.isfinite().all(), f"{spec.name}: a gradient of the score is not finite"
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all(), f"{spec.name}: a score has no gradient"
    alone = torch.cat([detector.score(image[None], encoder) for image in pixels])  # type: ignore[attr-defined]
    gap = float(((scores - alone).abs() / scores.abs().clamp(min=1e-3)).detach().max())
    assert gap < 1e-2, f"{spec.name}: alone and in a batch scores differ by {gap:.3g}"


DEFENSE_CHECKS: tuple[Callable[[DefenseSpec], None], ...] = (
    says_what_it_is,
    returns_images,
    treats_images_alone,
    is_as_random_as_declared,
    leaves_inputs_alone,
    lets_gradients_through,
    scores_images,
)


@functools.cache
def _learned(spec: DefenseSpec) -> Mapping[str, Tensor]:
    """What the defence learned: the shipped artefact where that is its default, else a training on the toy encoder."""
    defense = spec.build()
    victim = toy_victim()
    if defense.artifact:
        encoder = victim.encoder if spec.per_encoder else None
        return find_defense(spec, defense, encoder).artifact.tensors
    ground = toy_ground(victim, ThreatModel(eps=0))
    if not spec.per_encoder:
        ground = dataclasses.replace(ground, public=None)
    return DefenseJob(spec=spec, defense=defense, ground=ground).run(None).tensors


def _build(spec: DefenseSpec) -> Defense:
    if not spec.fits:
        built: Defense = spec.build()
        return built
    tensors = {name: tensor for name, tensor in _learned(spec).items() if name != CALIBRATION}
    armed: Defense = spec.build().armed(tensors)
    return armed


def _apply(defense: Defense, images: Tensor, *, seed: int = 0) -> Tensor:
    with fresh_draw(seed, _CPU), torch.no_grad():
        return defense.apply(images)
