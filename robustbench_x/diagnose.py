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
from robustbench_x.plan import UNDEFENDED, Cell
from robustbench_x.plugin import AttackSpec
from robustbench_x.randomness import SampleRandom
from robustbench_x.result import Finding, Measure
from robustbench_x.stats import mcnemar_exact
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import DefendedEncoder
from robustbench_x.views import Perceive

__all__ = ["CellRecord", "check_attackers", "check_cell", "check_pair", "probe_gradient", "probe_victim"]

_ALPHA = 0.05
_OVERRUN_SLACK = 1e-6
_MIN_CORRECT = 30
_MIN_RESISTED = 6
_REPEAT_GAP = 1e-4
_BATCH_GAP = 1e-2
"""Kernels differ with the batch size by rounding alone; batch statistics differ by far more."""
_FORGED = 0.1
"""A true gradient predicts its own finite difference within a factor of a few; 0.1 leaves room for curvature."""


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """A measured cell, as the checks need it."""

    cell: Cell
    spec: AttackSpec
    outcome: Outcome
    overrun: np.ndarray
    """`(N,)` pixels outside the budget before projection; NaN in error rows."""
    margin: np.ndarray
    """`(N,)` true logit minus the largest other on the adversarial image; NaN in error rows."""
    messages: tuple[str, ...]
    """Distinct error messages, most frequent first."""
    num_classes: int
    metrics: dict[str, Measure]


@torch.no_grad()
def probe_victim(images: Tensor, victim: DefendedEncoder, head: FittedHead) -> list[Finding]:
    """What forward passes alone reveal: NaN, probabilities, undeclared randomness, looks at the rest of the batch.

    Args:
        images: A few images `(N, 3, H, W)`, clean and perturbed: some defences fail on one kind only.
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
    if victim.stochastic:
        return found
    if (gap := _gap(logits, victim.logits(images, head))) > _REPEAT_GAP:
        return [*found, finding("undeclared_randomness", f"two passes over the same images differ by {gap:.2g}")]
    alone = torch.cat([victim.logits(image[None], head) for image in images])
    if (gap := _gap(logits, alone)) > _BATCH_GAP:
        found.append(finding("batch_dependence", f"alone and in a batch the same images differ by {gap:.2g}"))
    return found


def _gap(logits: Tensor, others: Tensor) -> float:
    """Largest distance of two sets of normalised logits, per sample."""
    return float((F.normalize(others, dim=1) - F.normalize(logits, dim=1)).norm(dim=1).max())


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
            return [finding("nonfinite_gradient", text)]
        if zero := int((flat.abs().amax(dim=1) == 0).sum()):
            text = f"{zero} of {len(images)} probed images have a gradient of exactly zero"
            return [finding("zero_gradient", text)]
        found = []
        if clean is None:
            (gradient_ce,) = torch.autograd.grad(F.cross_entropy(outputs, classes, reduction="sum"), start)
            if zero := int((gradient_ce.flatten(1).abs().amax(dim=1) == 0).sum()):
                doubt = finding("saturated_loss", f"on {zero} of {len(images)} probed images")
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
    """Central differences along the gradient's sign against what the gradient promises."""
    step = min(threat.radius, 4 / 255) / 16
    up, down = ((start + sign * step * gradient.sign()).clamp(0, 1) for sign in (1, -1))
    promised = ((up - down) * gradient).flatten(1).sum(dim=1)
    seen = _probe_loss(see(up), classes, clean) - _probe_loss(see(down), classes, clean)
    ratio = seen / promised.clamp(min=1e-30)
    # Where the promise drowns in float32 rounding nothing can be said.
    scale = see(start).abs().amax(dim=1) if clean is None else torch.ones_like(promised)
    clear = promised > 1e-5 * scale
    forged = clear & (ratio < _FORGED)
    if int(forged.sum()) * 2 <= max(int(clear.sum()), 1):
        return []
    median = float(ratio[clear].median())
    text = f"finite differences are {median:.2g} times what it promises (median of {int(clear.sum())} probed images)"
    return [finding("misleading_gradient", text)]


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
    if record.num_classes < 2:
        found.append(finding("nothing_to_attack", "the head has a single class, so it can never be wrong", cell.id))
    if not correct.any():
        return [*found, finding("nothing_to_attack", f"0 of {int(judged.sum())} clean samples are right", cell.id)]
    labels, predictions = out.label[judged], out.clean_pred[judged]
    if len(set(predictions)) == 1 and len(set(labels)) > 1:
        found.append(finding("constant_prediction", f"class {predictions[0]} for {len(predictions)} images", cell.id))
    accuracy = record.metrics["clean_accuracy"]
    # What a constant prediction would score here, or a draw of the dice.
    chance = max(float(np.bincount(labels).max()) / len(labels) if len(set(labels)) > 1 else 0, 1 / record.num_classes)
    if accuracy.low is not None and accuracy.low <= chance:
        message = f"{accuracy.value:.2f} on {record.num_classes} classes; one class for all would score {chance:.2f}"
        found.append(finding("chance_head", f"clean accuracy is {message}", cell.id))
    if int(correct.sum()) < _MIN_CORRECT:
        found.append(finding("few_samples", f"{int(correct.sum())} correct samples", cell.id))
    worst = float(np.nanmax(record.overrun[judged]))
    if record.spec.budget and worst > _OVERRUN_SLACK:
        found.append(finding("budget_overrun", f"by up to {worst:.3g} in pixel units", cell.id))
    found += _idle(record, correct & (out.adv_pred == out.label))
    asr, asr8 = record.metrics["asr"], record.metrics["asr_8bit"]
    if asr.value is not None and asr8.value is not None and asr.value - asr8.value > 0.01:
        found.append(finding("eight_bit_loss", f"asr {asr.value:.2f}, after rounding {asr8.value:.2f}", cell.id))
    return found


def _idle(record: CellRecord, resisted: np.ndarray) -> list[Finding]:
    """Whether the attack spent a tenth of its budget on at least half of the samples that resisted it."""
    cell, out = record.cell, record.outcome
    if not resisted.any() or cell.threat.radius == 0:
        return []
    moved, whole = (out.l2, cell.threat.eps) if cell.threat.norm == "l2" else (out.linf, cell.threat.radius)
    # In a patch any pixel may take any value; a change that no 8-bit file shows is none.
    still = resisted & (moved < (0.1 * whole if cell.threat.norm != "patch" else 1 / 510))
    if still.sum() <= 0.5 * resisted.sum():
        return []
    message = f"{int(still.sum())} of {int(resisted.sum())} samples it did not break came back all but unchanged"
    kind = finding("idle_attack", message, cell.id)
    # A search for the smallest change that asked the model and found none honestly returns what it was given.
    searched = not record.spec.budget and float(np.nansum(out.forwards[resisted])) > 0
    return [kind.model_copy(update={"level": "warning"})] if searched else [kind]


def check_attackers(records: Sequence[CellRecord], where: str) -> list[Finding]:
    """Whether the attacks on one victim at one budget are evidence at all.

    Args:
        records: Every cell of that victim and budget.
        where: What the findings are about.
    """
    attacks = [record for record in records if not record.spec.control]
    if not attacks:
        return [finding("only_controls", f"attacked by {', '.join(r.cell.attack for r in records)} alone", where)]
    cell = attacks[0].cell
    if cell.threat.radius == 0:
        return [finding("zero_budget", f"{cell.threat} leaves every image as it is", where)]
    if cell.defense != UNDEFENDED and all(r.cell.knowledge == "oblivious" for r in attacks):
        return [finding("no_adaptive_attack", f"every image was made without {cell.defense}", where)]
    return []


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
    # An attacker without the head, or blind to the defence, may honestly do less than noise; one who sees the whole
    # victim may not.
    sees_all = record.spec.access not in ("none", "encoder") and record.cell.knowledge in ("none", "full")
    doubts = []
    if significant:
        doubts.append(finding("weaker_than_noise", text, record.cell.id))
    elif (beaten := _behind_noise(record, other, both & ~mine)) is not None:
        doubts.append(finding("no_better_than_noise", beaten, record.cell.id))
    elif sees_all and lost > 0.01 * int(both.sum()):
        return [finding("noise_breaks_others", text, record.cell.id)]
    return doubts if sees_all else [doubt.model_copy(update={"level": "warning"}) for doubt in doubts]


def _behind_noise(record: CellRecord, noise: CellRecord, resisted: np.ndarray) -> str | None:
    """Whether the samples that resist are not even nearer to the boundary than after noise, sample by sample.

    Only for attacks that follow the gradient of this very victim over a fixed budget: others may honestly do no
    better. An honest gradient gets nearer on nearly every sample, so six are enough to tell.
    """
    spec, cell = record.spec, record.cell
    if spec.access != "whitebox" or not spec.budget or cell.knowledge == "oblivious" or cell.threat.radius == 0:
        return None
    nearer = int((record.margin < noise.margin)[resisted].sum())
    farther = int((record.margin > noise.margin)[resisted].sum())
    if resisted.sum() < _MIN_RESISTED or (nearer > farther and mcnemar_exact(nearer, farther) < _ALPHA):
        return None
    return f"of {int(resisted.sum())} samples that resist, it gets {nearer} nearer to the boundary than noise does"


def error_messages(messages: Sequence[str | None]) -> tuple[str, ...]:
    """Distinct messages, most frequent first."""
    counts: dict[str, int] = {}
    for message in messages:
        if message is not None:
            counts[message] = counts.get(message, 0) + 1
    return tuple(sorted(counts, key=lambda m: (-counts[m], m)))
