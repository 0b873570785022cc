"""Checks of the evaluation itself: probes of a victim before it is attacked, and of a cell after it is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.findings import finding
from robustbench_x.heads.base import FittedHead
from robustbench_x.metrics import Outcome
from robustbench_x.plan import Cell
from robustbench_x.plugin import AttackSpec
from robustbench_x.randomness import SampleRandom
from robustbench_x.result import Finding, Measure
from robustbench_x.stats import mcnemar_exact
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import DefendedEncoder
from robustbench_x.views import Perceive

__all__ = ["CellRecord", "check_cell", "check_pair", "probe_gradient", "probe_victim"]

_ALPHA = 0.05
_OVERRUN_SLACK = 1e-6
_MIN_CORRECT = 30


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """A measured cell, as the checks need it."""

    cell: Cell
    spec: AttackSpec
    outcome: Outcome
    overrun: np.ndarray
    """`(N,)` pixels outside the budget before projection; NaN in error rows."""
    messages: tuple[str, ...]
    """Distinct error messages, most frequent first."""
    num_classes: int
    metrics: dict[str, Measure]


@torch.no_grad()
def probe_victim(images: Tensor, victim: DefendedEncoder, head: FittedHead) -> list[Finding]:
    """What forward passes alone reveal: NaN, probabilities, undeclared randomness.

    Args:
        images: A few clean images `(N, 3, H, W)`.
        victim: The encoder as deployed.
        head: The head on top.
    """
    logits = victim.logits(images, head)
    if not logits.isfinite().all():
        rows = int((~logits.isfinite().all(dim=1)).sum())
        return [finding("nonfinite_output", f"{rows} of {len(images)} probed images give NaN or infinite logits")]
    found = []
    sums_to_one = (logits.sum(dim=1) - 1).abs().max() < 1e-5
    if logits.min() > -1e-5 and logits.max() < 1 + 1e-5 and sums_to_one and head.num_classes > 1:
        found.append(finding("not_logits", "every output row lies in [0, 1] and sums to 1"))
    if not victim.stochastic:
        again = victim.logits(images, head)
        gap = float((F.normalize(again, dim=1) - F.normalize(logits, dim=1)).norm(dim=1).max())
        if gap > 1e-4:
            found.append(finding("undeclared_randomness", f"two passes over the same images differ by {gap:.2g}"))
    return found


def probe_gradient(images: Tensor, see: Perceive, threat: ThreatModel, *, loss: str) -> list[Finding]:
    """What one backward pass at a random point of the budget reveals.

    Args:
        images: A few clean images.
        see: Pixels to outputs, exactly as the attacker runs it.
        threat: The budget; the probe point is random within it, since feature losses are flat at the clean image.
        loss: `margin` for logits, `cosine` for features.
    """
    random = SampleRandom(range(len(images)), device=images.device)
    start = threat.start(images, random).requires_grad_(True)
    with torch.enable_grad():
        outputs = see(start)
        if not outputs.requires_grad:
            return [finding("broken_graph", "the output carries no gradient")]
        if loss == "margin":
            top = outputs.topk(min(2, outputs.shape[1]), dim=1).values
            value = top[:, 0] - top[:, -1]
        else:
            with torch.no_grad():
                clean = see(images)
            value = 1 - F.cosine_similarity(outputs, clean, dim=1)
        (gradient,) = torch.autograd.grad(value.sum(), start, allow_unused=True)
    if gradient is None:
        return [finding("broken_graph", "no gradient reaches the pixels")]
    flat = gradient.flatten(1)
    if not flat.isfinite().all():
        rows = int((~flat.isfinite().all(dim=1)).sum())
        return [finding("nonfinite_gradient", f"{rows} of {len(images)} probed images have NaN or infinite gradients")]
    zero = int((flat.abs().amax(dim=1) == 0).sum())
    if zero:
        return [finding("zero_gradient", f"{zero} of {len(images)} probed images have a gradient of exactly zero")]
    return []


def check_cell(record: CellRecord) -> list[Finding]:
    """What the measured rows of one cell reveal about its own evaluation."""
    out, cell = record.outcome, record.cell
    judged = ~out.error
    found = []
    if not judged.all():
        count = int(out.error.sum())
        found.append(finding("sample_errors", f"{count} of {len(judged)} samples: {record.messages[0]}", cell.id))
    if not judged.any():
        return found
    correct = judged & (out.clean_pred == out.label)
    if not correct.any():
        return [*found, finding("nothing_to_attack", f"0 of {int(judged.sum())} clean samples are right", cell.id)]
    accuracy = record.metrics["clean_accuracy"]
    if accuracy.low is not None and accuracy.low <= 1 / record.num_classes:
        message = f"{accuracy.value:.2f} on {record.num_classes} classes"
        found.append(finding("chance_head", f"clean accuracy is {message}", cell.id))
    if int(correct.sum()) < _MIN_CORRECT:
        found.append(finding("few_samples", f"{int(correct.sum())} correct samples", cell.id))
    worst = float(np.nanmax(record.overrun[judged]))
    if record.spec.budget and worst > _OVERRUN_SLACK:
        found.append(finding("budget_overrun", f"by up to {worst:.3g} in pixel units", cell.id))
    resisted = correct & (out.adv_pred == out.label)
    if cell.threat.radius > 0 and resisted.any() and not (out.linf[resisted] > 0).any():
        message = f"all {int(resisted.sum())} samples it did not break came back unchanged"
        kind = finding("idle_attack", message, cell.id)
        asked = float(np.nansum(out.forwards[resisted])) > 0
        found.append(kind.model_copy(update={"level": "warning"}) if asked else kind)
    asr, asr8 = record.metrics["asr"], record.metrics["asr_8bit"]
    if asr.value is not None and asr8.value is not None and asr.value - asr8.value > 0.01:
        found.append(finding("eight_bit_loss", f"asr {asr.value:.2f}, after rounding {asr8.value:.2f}", cell.id))
    return found


def check_pair(record: CellRecord, other: CellRecord, kind: str) -> list[Finding]:
    """Whether `other` breaks samples of the same victim that `record` does not, and whether that is chance.

    Args:
        record: The cell under suspicion.
        other: The noise control (`kind="noise"`), or the same attack with `bpda` knowledge (`kind="bpda"`).
        kind: Which comparison this is.
    """
    both = ~record.outcome.error & ~other.outcome.error & (record.outcome.clean_pred == record.outcome.label)
    mine = both & (record.outcome.adv_pred != record.outcome.label)
    theirs = both & (other.outcome.adv_pred != other.outcome.label)
    lost, gained = int((theirs & ~mine).sum()), int((mine & ~theirs).sum())
    significant = lost > gained and mcnemar_exact(lost, gained) < _ALPHA
    text = f"{lost} samples broken by it are not broken here, {gained} the other way round"
    if kind == "bpda":
        return [finding("bpda_beats_full", text, record.cell.id)] if significant else []
    if significant:
        return [finding("weaker_than_noise", text, record.cell.id)]
    if record.spec.access == "whitebox" and lost > 0.01 * int(both.sum()):
        return [finding("noise_breaks_others", text, record.cell.id)]
    return []


def error_messages(messages: Sequence[str | None]) -> tuple[str, ...]:
    """Distinct messages, most frequent first."""
    counts: dict[str, int] = {}
    for message in messages:
        if message is not None:
            counts[message] = counts.get(message, 0) + 1
    return tuple(sorted(counts, key=lambda m: (-counts[m], m)))
