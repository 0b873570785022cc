"""Probes of a victim before it is attacked, by forward and backward passes over a few images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.findings import finding
from robustbench_x.heads.base import FittedHead
from robustbench_x.randomness import SampleRandom
from robustbench_x.result import Finding
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import DefendedEncoder
from robustbench_x.views import Perceive

__all__ = ["probe_defense", "probe_detector", "probe_gradient", "probe_loss", "probe_victim"]

_PASSES = 5
_REPEAT_GAP = 1e-4
_BATCH_GAP = 1e-2
"""Kernels differ with the batch size by rounding alone; batch statistics differ by far more."""
_KEPT_NORM, _KEPT_COSINE, _LOST_PIXELS = 0.2, 0.3, 0.3
_JUMPS, _JUMPY = 100, 0.1
_ENGINE = "_engine_run_backward"
"""What every public function of torch.autograd goes through, in the versions that have it."""
_FORGED = 0.1
"""A true gradient predicts its own finite difference within a factor of a few; 0.1 leaves room for curvature."""
_FINER, _TRUE = (4, 16), 0.5
"""Parts of the step at which a doubted gradient is tried again, and how far from 1 a ratio may be that clears it."""
_OVERSTATED = 0.25
"""A gradient that promises more than four times what is there misleads, even where it is true for a while: what a
ripple keeps of its slope's promise, sin(x) / x, is in (-0.22, 0.1) wherever it is below 0.1."""
_CLEAR, _CLEAR_FINER = 1e-5, 2e-6
"""Smallest promise, as a part of the outputs, that float32 rounding leaves legible; a verdict of guilt needs more."""


@torch.no_grad()
def probe_victim(images: Tensor, victim: DefendedEncoder, head: FittedHead) -> list[Finding]:
    """What forward passes alone reveal: NaN, probabilities, undeclared randomness, looks at the rest of the batch.

    Args:
        images: A few images `(N, 3, H, W)`, clean and perturbed: some defences fail on one kind only.
        victim: The encoder as deployed.
        head: The head on top.
    """
    with _counted_backwards() as loops:
        logits = victim.logits(images, head)
    found = []
    if loops:
        found.append(finding("loop_at_inference", f"{len(loops)} backward passes to answer once", figure=len(loops)))
    if not logits.isfinite().all():
        rows = int((~logits.isfinite().all(dim=1)).sum())
        text = f"{rows} of {len(images)} probed images give NaN or infinite logits"
        return [*found, finding("nonfinite_output", text, figure=rows)]
    off = float((logits.sum(dim=1) - 1).abs().max())
    if logits.min() > -1e-5 and logits.max() < 1 + 1e-5 and off < 1e-5 and head.num_classes > 1:
        found.append(finding("not_logits", "every output row lies in [0, 1] and sums to 1", figure=off))
    if victim.stochastic:
        return found
    gap = max(_gap(logits, victim.logits(images, head)) for _ in range(_PASSES - 1))
    if gap > _REPEAT_GAP:
        text = f"{_PASSES} passes over the same images differ by {gap:.2g}"
        return [*found, finding("undeclared_randomness", text, figure=gap)]
    alone = torch.cat([victim.logits(image[None], head) for image in images])
    if (gap := _gap(logits, alone)) > _BATCH_GAP:
        text = f"alone and in a batch the same images differ by {gap:.2g}"
        found.append(finding("batch_dependence", text, figure=gap))
    return found


@contextmanager
def _counted_backwards() -> Iterator[list[str]]:
    """Backward passes that are begun inside the block, by the name of the function."""
    calls: list[str] = []
    # The engine where it can be had: a function that a defence imported by name is not looked up again.
    names = [_ENGINE] if hasattr(torch.autograd, _ENGINE) else ["grad", "backward"]
    held = {name: getattr(torch.autograd, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return held[name](*args, **kwargs)

        return run

    try:
        for name in held:
            setattr(torch.autograd, name, counting(name))
        yield calls
    finally:
        for name, original in held.items():
            setattr(torch.autograd, name, original)


def _gap(logits: Tensor, others: Tensor) -> float:
    """Largest distance of two sets of normalised logits, per sample; infinite where `others` are not finite."""
    gaps = (F.normalize(others, dim=1) - F.normalize(logits, dim=1)).norm(dim=1)
    return float(gaps.nan_to_num(nan=torch.inf).max())


def probe_gradient(
    images: Tensor, see: Perceive, threat: ThreatModel, *, loss: str, honest: bool = False
) -> list[Finding]:
    """What backward passes at a random point of the budget reveal.

    Args:
        images: A few clean images.
        see: Pixels to outputs, exactly as the attacker runs it.
        threat: The budget; the probe point is random within it, since feature losses are flat at the clean image.
        loss: `margin` for logits, `cosine` for features.
        honest: The gradient claims to be that of the value, so finite differences must agree with it: no stand-in,
            nothing random.
    """
    random = SampleRandom(range(len(images)), device=images.device)
    start = threat.start(images, random).requires_grad_(True)
    clean = None
    if loss == "cosine":
        with torch.no_grad():
            clean = see(images)
    with torch.enable_grad():
        outputs = see(start)
        if not outputs.requires_grad:
            return [finding("broken_graph", "the output carries no gradient")]
        classes = outputs.detach().argmax(dim=1)
        value = _probe_loss(outputs, classes, clean)
        (gradient,) = torch.autograd.grad(value.sum(), start, allow_unused=True, retain_graph=True)
        if gradient is None:
            return [finding("broken_graph", "no gradient reaches the pixels")]
        flat = gradient.flatten(1)
        if not flat.isfinite().all():
            rows = int((~flat.isfinite().all(dim=1)).sum())
            text = f"{rows} of {len(images)} probed images have NaN or infinite gradients"
            return [finding("nonfinite_gradient", text, figure=rows)]
        if zero := int((flat.abs().amax(dim=1) == 0).sum()):
            text = f"{zero} of {len(images)} probed images have a gradient of exactly zero"
            return [finding("zero_gradient", text, figure=zero)]
        found = []
        if clean is None:
            (gradient_ce,) = torch.autograd.grad(F.cross_entropy(outputs, classes, reduction="sum"), start)
            if zero := int((gradient_ce.flatten(1).abs().amax(dim=1) == 0).sum()):
                doubt = finding("saturated_loss", f"on {zero} of {len(images)} probed images", figure=zero)
                # A linear head fitted to convergence may do that to a lone image.
                few = zero * 2 <= len(images)
                found.append(doubt.model_copy(update={"level": "note"}) if few else doubt)
    if honest:
        found += _compare_differences(see, start.detach(), gradient, classes, clean, threat)
    return found


def _probe_loss(outputs: Tensor, classes: Tensor, clean: Tensor | None) -> Tensor:
    """Margin of the class predicted at the probe point, or cosine distance to the clean features, `(N,)`."""
    if clean is not None:
        return 1 - F.cosine_similarity(outputs, clean, dim=1)
    own = outputs.gather(1, classes[:, None]).squeeze(1)
    # A sum over the others, not their maximum: it has no kink between the two points of a difference.
    return own - (outputs.sum(dim=1) - own) / max(outputs.shape[1] - 1, 1)


@torch.no_grad()
def _compare_differences(
    see: Perceive, start: Tensor, gradient: Tensor, classes: Tensor, clean: Tensor | None, threat: ThreatModel
) -> list[Finding]:
    """Central differences along the gradient's sign against what the gradient promises.

    Curvature may swamp the first-order term at the whole step, as in a steep softmax. Then the change is not small,
    only another one, and finer steps bring its ratio to the promise to 1; a forged gradient is wrong at every step.
    """
    whole = min(threat.radius, 4 / 255) / 16
    # Where the promise drowns in float32 rounding nothing can be said.
    scale = see(start).abs().amax(dim=1).cpu().double() if clean is None else torch.tensor(1.0).double()

    def compare(step: float) -> tuple[Tensor, Tensor]:
        """What the gradient promises of a step, and how many times that is seen, `(N,)` each."""
        up, down = ((start + sign * step * gradient.sign()).clamp(0, 1) for sign in (1, -1))
        promised = ((up - down) * gradient).flatten(1).sum(dim=1).cpu().double()
        # In float64, on the CPU since not every device has it: a cosine near 1 has no digits to spare.
        own, reference = classes.cpu(), None if clean is None else clean.cpu().double()
        above, below = (_probe_loss(see(x).cpu().double(), own, reference) for x in (up, down))
        return promised, (above - below) / promised.clamp(min=1e-30)

    promised, ratio = compare(whole)
    clear = promised > _CLEAR * scale
    forged = clear & (ratio < _FORGED)
    if _most(forged, clear):
        finest = ratio
        for part in _FINER:
            promised, finer = compare(whole / part)
            finest = torch.where(promised > _CLEAR_FINER * scale, finer, finest)
        forged &= (ratio.abs() < _OVERSTATED) | ((finest - 1).abs() > _TRUE)
    if not _most(forged, clear):
        return []
    median = float(ratio[clear].median())
    text = f"finite differences are {median:.2g} times what it promises (median of {int(clear.sum())} probed images)"
    return [finding("misleading_gradient", text, figure=median)]


def _most(some: Tensor, of: Tensor) -> bool:
    """Whether `some` are more than half `of` them."""
    return int(some.sum()) * 2 > max(int(of.sum()), 1)


def probe_defense(images: Tensor, see: Perceive, *, others: bool) -> list[Finding]:
    """What a defence's own gradient keeps of what is sent back through it.

    Args:
        images: A few clean images.
        see: Pixels to pixels, as an attacker with full knowledge runs it.
        others: Whether the audit has attackers who pass gradients through otherwise.
    """
    pixels = images.clone().requires_grad_(True)
    with torch.enable_grad():
        seen = see(pixels)
        if seen.ndim != 4 or not seen.requires_grad:
            return []  # several looks have no gradient of the same shape to compare; a missing graph is found elsewhere
        sent = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0)).to(seen.device)
        (back,) = torch.autograd.grad((seen * sent).sum(), pixels, allow_unused=True)
    if back is None or not back.isfinite().all():
        return []  # the probe of the gradient says so
    if seen.shape != images.shape:
        sent = F.interpolate(sent, images.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    flat, wanted = back.flatten(1), sent.flatten(1)
    norm = float((flat.norm(dim=1) / wanted.norm(dim=1)).median())
    cosine = float(F.cosine_similarity(flat, wanted, dim=1).median())
    zero = float((flat == 0).float().mean())
    if norm >= _KEPT_NORM and cosine >= _KEPT_COSINE and zero <= _LOST_PIXELS:
        return []
    text = f"its gradient keeps {norm:.2f} of the norm, with cosine {cosine:.2f}; {zero:.0%} of the pixels get none"
    return [finding("attenuated_gradient", text, figure=norm, level="note" if others else "warning")]


def probe_detector(images: Tensor, victim: DefendedEncoder, threat: ThreatModel) -> list[Finding]:
    """Whether a detector can be evaded by its gradient at all, and whether it answers an image always alike.

    Args:
        images: A few clean images.
        victim: The encoder behind the detector.
        threat: The budget; the probe point is random within it.
    """

    def see(pixels: Tensor) -> Tensor:
        accepted = victim.acceptance(pixels)
        return torch.stack([accepted, torch.zeros_like(accepted)], dim=1)

    doubts = probe_gradient(images, see, threat, loss="margin", honest=True)
    problems = [f"{doubt.id}: {doubt.message}" for doubt in doubts if doubt.id != "saturated_loss"]
    with torch.no_grad():
        first, again = victim.acceptance(images), victim.acceptance(images)
        alone = torch.cat([victim.acceptance(image[None]) for image in images])
    for words, other, limit in (("two passes", again, _REPEAT_GAP), ("alone and in a batch", alone, _BATCH_GAP)):
        gap = float(((first - other).abs() / first.abs().clamp(min=1)).max())
        if not gap <= limit:
            problems.append(f"{words} differ by {gap:.2g}")
    return [finding("masked_detector", "; ".join(problems))] if problems else []


@torch.no_grad()
def probe_loss(images: Tensor, see: Perceive, labels: Tensor, *, honest: bool) -> list[Finding]:
    """How much the cross-entropy jumps around each image (a hundred draws).

    Args:
        images: A few clean images.
        see: Pixels to logits, as the attacker runs it.
        labels: `(N,)`.
        honest: The gradient was found to agree with finite differences.
    """
    loss = F.cross_entropy(see(images), labels, reduction="none")
    total = torch.zeros_like(loss)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_JUMPS):
        noise = (2 * torch.rand(images.shape, generator=generator) - 1).to(images.device) * 4 / 255
        moved = F.cross_entropy(see((images + noise).clamp(0, 1)), labels, reduction="none")
        total += ((moved - loss).abs() / loss.abs().clamp(min=1e-12)).clamp(max=1)
    share = float((total / _JUMPS).mean())
    if share <= _JUMPY:
        return []
    text = f"noise of 4/255 changes the loss by {share:.0%} on average (capped at 100 % a draw)"
    return [finding("unstable_loss", text, figure=share, level="note" if honest else "warning")]
