"""Checks of one measured cell, alone and against another of the same victim."""

import numpy as np

from robustbench_x.diagnose.record import CellRecord
from robustbench_x.findings import finding
from robustbench_x.result import Finding
from robustbench_x.stats import mcnemar_exact

__all__ = ["check_cell", "check_pair"]

_ALPHA = 0.05
_OVERRUN_SLACK = 1e-6
_MIN_CORRECT = 30
_MIN_RESISTED = 6
_GAINING = 0.05
_UNCONVERGED = 0.1


def check_cell(record: CellRecord) -> list[Finding]:
    """What the measured rows of one cell reveal about its own evaluation."""
    out, cell = record.outcome, record.cell
    judged = ~out.error
    found = []
    if not judged.all():
        count = int(out.error.sum())
        text = f"{count} of {len(judged)} samples: {record.messages[0]}"
        found.append(finding("sample_errors", text, cell.id, figure=count))
    if not judged.any():
        return found
    correct = out.clean_correct
    if record.num_classes < 2:
        found.append(finding("nothing_to_attack", "the head has a single class, so it can never be wrong", cell.id))
    if not correct.any():
        return [*found, finding("nothing_to_attack", f"0 of {int(judged.sum())} clean samples are right", cell.id)]
    labels, predictions = out.label[judged], out.clean_pred[judged]
    if len(set(predictions)) == 1 and len(set(labels)) > 1:
        text = f"class {predictions[0]} for {len(predictions)} images"
        found.append(finding("constant_prediction", text, cell.id, figure=1))
    accuracy = record.metrics["clean_accuracy"]
    # What a constant prediction would score here, or a draw of the dice.
    chance = max(float(np.bincount(labels).max()) / len(labels) if len(set(labels)) > 1 else 0, 1 / record.num_classes)
    if accuracy.low is not None and accuracy.low <= chance:
        message = f"{accuracy.value:.2f} on {record.num_classes} classes; one class for all would score {chance:.2f}"
        found.append(finding("chance_head", f"clean accuracy is {message}", cell.id, figure=accuracy.low))
    if int(correct.sum()) < _MIN_CORRECT:
        count = int(correct.sum())
        found.append(finding("few_samples", f"{count} correct samples", cell.id, figure=count))
    worst = float(np.nanmax(record.overrun[judged]))
    if record.spec.budget and worst > _OVERRUN_SLACK:
        found.append(finding("budget_overrun", f"by up to {worst:.3g} in pixel units", cell.id, figure=worst))
    found += _idle(record, correct & ~out.fooled)
    found += _watched(record)
    if record.num_classes in (2, 3):
        text = f"the head has {record.num_classes} classes"
        found.append(finding("few_classes", text, cell.id, figure=record.num_classes))
    asr, asr8 = record.metrics["asr"], record.metrics["asr_8bit"]
    if asr.value is not None and asr8.value is not None and asr.value - asr8.value > 0.01:
        text = f"asr {asr.value:.2f}, after rounding {asr8.value:.2f}"
        found.append(finding("eight_bit_loss", text, cell.id, figure=asr.value - asr8.value))
    return found


def _watched(record: CellRecord) -> list[Finding]:
    """What was seen of the victim while it was attacked, against what came back."""
    out, cell = record.outcome, record.cell
    correct, resisted = out.clean_correct, out.clean_correct & ~out.fooled
    if not resisted.any() or not np.isfinite(record.seen_fooled[resisted]).any():
        return []
    found = []
    lost = resisted & (record.seen_fooled == 1)
    share = float(lost.sum() / correct.sum())
    if lost.any():
        text = f"on {int(lost.sum())} of {int(correct.sum())} correct samples it was seen to win, and came back without"
        found.append(finding("silent_success", text, cell.id, figure=share))
    rising = resisted & (record.late_gain > _GAINING)
    late = float(rising.sum() / resisted.sum())
    if late > _UNCONVERGED and record.spec.access == "whitebox":
        text = f"{int(rising.sum())} of {int(resisted.sum())} resisting samples were still gaining"
        found.append(finding("unconverged", text, cell.id, figure=late))
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
    kind = finding("idle_attack", message, cell.id, figure=float(still.sum() / resisted.sum()))
    # A search for the smallest change that asked the model and found none honestly returns what it was given.
    searched = not record.spec.budget and float(np.nansum(out.forwards[resisted])) > 0
    return [kind.model_copy(update={"level": "warning"})] if searched else [kind]


def check_pair(record: CellRecord, other: CellRecord, kind: str) -> list[Finding]:
    """Whether `other` breaks samples of the same victim that `record` does not, and whether that is chance.

    Args:
        record: The cell under suspicion.
        other: The noise control (`kind="noise"`), or the same attack with `bpda` knowledge (`kind="bpda"`).
        kind: Which comparison this is.
    """
    both = ~other.outcome.error & record.outcome.clean_correct
    mine = both & record.outcome.fooled
    theirs = both & other.outcome.fooled
    lost, gained = int((theirs & ~mine).sum()), int((mine & ~theirs).sum())
    chance = mcnemar_exact(lost, gained) if lost > gained else 1.0
    significant = chance < _ALPHA
    text = f"{lost} samples broken by it are not broken here, {gained} the other way round"
    if kind == "bpda":
        return [finding("bpda_beats_full", text, record.cell.id, figure=chance)] if significant else []
    # An attacker without the head, or blind to the defence, may honestly do less than noise; one who sees the whole
    # victim may not.
    sees_all = record.spec.access not in ("none", "encoder") and record.cell.knowledge in ("none", "full")
    doubts = []
    if significant:
        doubts.append(finding("weaker_than_noise", text, record.cell.id, figure=chance))
    elif (doubt := _behind_noise(record, other, both & ~mine)) is not None:
        doubts.append(doubt)
    elif sees_all and lost > 0.01 * int(both.sum()):
        return [finding("noise_breaks_others", text, record.cell.id, figure=lost / int(both.sum()))]
    return doubts if sees_all else [d.model_copy(update={"level": "warning"}) for d in doubts]


def _behind_noise(record: CellRecord, noise: CellRecord, resisted: np.ndarray) -> Finding | None:
    """Whether the samples that resist are not even nearer to the boundary than after noise, sample by sample.

    Only for attacks that follow the gradient of this very victim over a fixed budget: others may honestly do no
    better. An honest gradient gets nearer on nearly every sample, so six are enough to tell.
    """
    spec, cell = record.spec, record.cell
    if spec.access != "whitebox" or not spec.budget or cell.knowledge == "oblivious" or cell.threat.radius == 0:
        return None
    nearer = int((record.margin < noise.margin)[resisted].sum())
    farther = int((record.margin > noise.margin)[resisted].sum())
    chance = mcnemar_exact(nearer, farther) if nearer > farther else 1.0
    if resisted.sum() < _MIN_RESISTED or chance < _ALPHA:
        return None
    text = f"of {int(resisted.sum())} samples that resist, it gets {nearer} nearer to the boundary than noise does"
    return finding("no_better_than_noise", text, cell.id, figure=chance)
