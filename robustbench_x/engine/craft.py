"""One craft on one batch: hand the attack its view, run it, judge what comes back, return rows."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustbench_x.config import AuditConfig
from robustbench_x.data.dataset import Item
from robustbench_x.engine.handout import AttackAtWork, hand_out
from robustbench_x.engine.isolation import isolated
from robustbench_x.engine.stage import Batch, StageAtWork
from robustbench_x.errors import AttackError
from robustbench_x.heads.base import CAPTIONED, FittedHead
from robustbench_x.judge import (
    UNJUDGED,
    Admitted,
    Measured,
    Reading,
    admit,
    feature_cosine,
    first_errors,
    measure,
    predict,
    read_features,
    retrieve,
)
from robustbench_x.plan import Cell, Craft
from robustbench_x.randomness import derive_seed
from robustbench_x.store import ACCEPTED, RANKED, SAID, SCORED
from robustbench_x.views import Meter, QueryView
from robustbench_x.witness import Testimony

__all__ = ["craft_rows", "failed_rows", "is_out_of_memory"]

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What came of running the attack: images with errors, what they cost, how far they moved, and what was seen."""

    admitted: Admitted
    measured: Measured
    forwards: float
    backwards: float
    seconds: float
    testimony: Testimony | None


def craft_rows(stage: StageAtWork, work: AttackAtWork, batch: Batch, config: AuditConfig, part: slice) -> list[Row]:
    """Rows of part of a batch, for every cell of the craft; unreadable images come with the part that starts at 0.

    Everything that goes wrong with the attack or the victim becomes an error row of the samples concerned.

    Raises:
        BaseException: Out of memory (the caller halves the part), and what is no `Exception`.
    """
    rows = _unreadable_rows(stage, work.craft, batch) if part.start == 0 else []
    if not len(batch.images[part]):
        return rows
    seeds = _seeds(stage, work, batch, part)
    made = _make(stage, work, batch, part, seeds, config)
    if isinstance(made, str):
        return rows + _failed(stage, work, batch, part, made)
    alike: dict[tuple[str, str], list[Cell]] = {}
    for cell in work.craft.cells:
        alike.setdefault((cell.defense, stage.reader(cell.head)), []).append(cell)
    for cells in alike.values():
        rows += _judge(stage, work, cells, batch, part, made, seeds)
    return rows


def failed_rows(stage: StageAtWork, work: AttackAtWork, batch: Batch, part: slice, error: str) -> list[Row]:
    """The rows of `craft_rows` when nothing could be made of the part at all."""
    rows = _unreadable_rows(stage, work.craft, batch) if part.start == 0 else []
    return rows + _failed(stage, work, batch, part, error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is any of the ways in which torch says that memory is short."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _seeds(stage: StageAtWork, work: AttackAtWork, batch: Batch, part: slice) -> list[int]:
    return [derive_seed(stage.seed, work.craft.attack.title, item.id) for item in batch.items[part]]


def _failed(stage: StageAtWork, work: AttackAtWork, batch: Batch, part: slice, error: str) -> list[Row]:
    return [
        _error_row(stage, cell, batch, part.start + i, error, seed)
        for cell in work.craft.cells
        for i, seed in enumerate(_seeds(stage, work, batch, part))
    ]


def _make(
    stage: StageAtWork, work: AttackAtWork, batch: Batch, part: slice, seeds: list[int], config: AuditConfig
) -> _Made | str:
    """The attack's images after admission, or why there are none."""
    inputs = batch.images[part]
    meter = Meter()
    try:
        view, witness = hand_out(stage, work, batch, part, seeds, meter, config)
    except AttackError as error:  # there is nothing to aim at
        return str(error)
    started = time.perf_counter()
    problem = None
    try:
        with isolated(view.random.seed, stage.device):
            candidates = work.attack.run(view)
        if stage.device.type == "cuda":
            torch.cuda.synchronize(stage.device)
        seconds = time.perf_counter() - started
        admitted = admit(candidates, inputs, work.craft.threat)
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {error}"
    finally:
        if isinstance(view, QueryView):
            view.query.close()
        # Here, so that an attack that tampers and then runs out of memory leaves nothing behind either.
        broken = stage.seal.broken()
        if broken is not None:
            stage.seal.restore()
    if broken is not None:
        return broken
    if problem is not None:
        return problem
    return _Made(
        admitted=admitted,
        measured=measure(admitted.images, inputs),
        forwards=meter.forwards / len(inputs),
        backwards=meter.backwards / len(inputs),
        seconds=seconds / len(inputs),
        testimony=None if witness is None else witness.testify(),
    )


def _judge(
    stage: StageAtWork, work: AttackAtWork, cells: list[Cell], batch: Batch, part: slice, made: _Made, seeds: list[int]
) -> list[Row]:
    """Rows of cells of one defence and one encoder, from one pass over the images and one over their 8-bit versions."""
    shield, head = cells[0].defense, cells[0].head
    inputs, images = batch.images[part], made.admitted.images
    count = len(inputs)
    try:
        clean = stage.clean(shield, head, batch, part=part)
        seed = derive_seed(stage.seed, "adversarial", *seeds)
        victim = stage.defended(shield, head)
        adversarial = read_features(images, victim, draws=stage.judge_draws, seed=seed)
        levels = cells[0].threat.quantize(images, inputs)
        rounded = read_features(levels, victim, draws=stage.judge_draws, seed=seed)
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        problem = f"the victim failed: {type(error).__name__}: {error}"
        return [
            _error_row(stage, cell, batch, part.start + i, problem, seeds[i]) for cell in cells for i in range(count)
        ]
    rows = []
    for cell in cells:
        try:
            rows += _rows(stage, work, cell, batch, part, made, (clean, adversarial, rounded), seeds)
        except (Exception, SystemExit) as error:  # a head that is a whole model runs here
            if is_out_of_memory(error):
                raise
            problem = f"head {cell.head} failed: {type(error).__name__}: {error}"
            rows += [_error_row(stage, cell, batch, part.start + i, problem, seeds[i]) for i in range(count)]
    return rows


def _rows(
    stage: StageAtWork,
    work: AttackAtWork,
    cell: Cell,
    batch: Batch,
    part: slice,
    made: _Made,
    readings: tuple[Reading, Reading, Reading],
    seeds: list[int],
) -> list[Row]:
    head = stage.heads[cell.head]
    labels = stage.labels[cell.head][list(batch.positions[part])]
    clean, adversarial, _ = readings
    verdicts = [predict(reading, head, labels) for reading in readings]
    predictions = [verdict.classes.tolist() for verdict in verdicts]
    margin = verdicts[1].margin.tolist()
    cosine = feature_cosine(adversarial, clean).tolist()
    if head.settings.get("reads_pixels"):
        cosine = [None] * len(cosine)  # of pixels it would be, and not of features
    linf, l2, ssim = (m.tolist() for m in (made.measured.linf, made.measured.l2, made.measured.ssim))
    overrun = made.admitted.overrun.tolist()
    accepted = {
        name: reading.acceptance.tolist()
        for name, reading in zip(ACCEPTED, readings, strict=True)
        if reading.acceptance is not None
    }
    # What was seen of the undefended victim is no testimony about the defended one.
    seen = made.testimony if cell.defense == work.craft.seen else None
    ranked = _ranked(head, clean, adversarial, labels)
    scored = _scored(head, clean, adversarial)
    # A control is measured against the same targets, though it knows of none: that is what they are worth by chance.
    aiming = work.spec.aims or (work.spec.control and stage.aims)
    aimed = [stage.targets.of(item) for item in batch.items[part]] if aiming else None
    targets = _target_labels(stage, cell, aimed, len(labels))
    said = _said(head, clean, adversarial, batch.items[part], aimed)
    rows = []
    for i, error in enumerate(first_errors(made.admitted.errors, *(v.errors for v in verdicts))):
        if error is not None:
            rows.append(_error_row(stage, cell, batch, part.start + i, error, seeds[i]))
            continue
        clean_pred, adv_pred, adv8_pred = (p[i] for p in predictions)
        label = int(labels[i])
        acceptance = {name: values[i] for name, values in accepted.items()}
        correct = clean_pred == label and acceptance.get("clean_acceptance", 0.0) >= 0
        let_in = acceptance.get("adv_acceptance", 0.0) >= 0
        rows.append(
            {
                **_identity(cell, batch.positions[part.start + i], batch.items[part.start + i].id, label),
                "sha256": batch.digests[part.start + i],
                "clean_pred": clean_pred,
                "adv_pred": adv_pred,
                "adv8_pred": adv8_pred,
                "target": targets[i],
                "clean_correct": correct,
                "fooled": correct and adv_pred != label and let_in,
                "flipped": adv_pred != clean_pred and let_in,
                "margin": margin[i],
                "linf": linf[i],
                "l2": l2[i],
                "ssim": ssim[i],
                "feature_cosine": cosine[i],
                **{name: values[i] for name, values in ranked.items()},
                **{name: [group[i] for group in groups] for name, groups in scored.items()},
                **{name: texts[i] for name, texts in said.items()},
                **acceptance,
                "seen_fooled": None if seen is None else seen.fooled[i],
                "late_gain": None if seen is None or math.isnan(seen.late_gain[i]) else seen.late_gain[i],
                "overrun": overrun[i],
                "forwards": made.forwards,
                "backwards": made.backwards,
                "seconds": made.seconds,
                "seed": seeds[i],
            }
        )
    return rows


def _ranked(head: FittedHead, clean: Reading, adversarial: Reading, labels: Tensor) -> dict[str, list[float]]:
    """The retrieval columns; none where the head ranks nothing."""
    if head.task != "retrieval":
        return {}
    before, after = retrieve(clean, head, labels), retrieve(adversarial, head, labels)
    values = (before.precision, after.precision, before.first, after.first)
    return {name: column.tolist() for name, column in zip(RANKED, values, strict=True)}


def _scored(head: FittedHead, clean: Reading, adversarial: Reading) -> dict[str, list[list[list[float]]]]:
    """Per group of captions the scores of every image, the mean over draws; none where the head ranks no captions."""
    if head.task not in CAPTIONED:
        return {}
    found = {}
    for name, reading in zip(SCORED, (clean, adversarial), strict=True):
        draws = [head.scores(features) for features in reading.features]
        found[name] = [torch.stack(group).mean(dim=0).tolist() for group in zip(*draws, strict=True)]
    return found


def _said(
    head: FittedHead, clean: Reading, adversarial: Reading, items: Sequence[Item], aimed: Sequence[Item | None] | None
) -> dict[str, Sequence[Any]]:
    """What the victim says of either image, on the first draw, beside the captions of the image and of its target."""
    if head.task != "captioning":
        return {}
    targets: list[list[str] | None] = [None] * len(items)
    if aimed is not None:
        targets = [None if item is None else list(item.captions) for item in aimed]
    said = (head.say(reading.features[0]) for reading in (clean, adversarial))
    return dict(zip(SAID, (*said, [list(item.captions) for item in items], targets), strict=True))


def _target_labels(
    stage: StageAtWork, cell: Cell, aimed: Sequence[Item | None] | None, count: int
) -> Sequence[int | None]:
    """The class that each image was aimed at, as this head counts; None for an attack that does not aim."""
    if aimed is None:
        return [None] * count
    # Without a target the attack would not have run at all.
    labels = stage.heads[cell.head].labels(stage.dataset.classes, [item for item in aimed if item is not None])
    return list(labels.tolist())


def _error_row(stage: StageAtWork, cell: Cell, batch: Batch, index: int, error: str, seed: int) -> Row:
    position = batch.positions[index]
    label = int(stage.labels[cell.head][position])
    identity = _identity(cell, position, batch.items[index].id, label)
    return {**identity, **_NO_VERDICT, "sha256": batch.digests[index], "seed": seed, "error": error}


def _unreadable_rows(stage: StageAtWork, craft: Craft, batch: Batch) -> list[Row]:
    return [
        {
            **_identity(cell, position, item.id, int(stage.labels[cell.head][position])),
            **_NO_VERDICT,
            "error": message,
        }
        for cell in craft.cells
        for position, (item, message) in batch.unreadable.items()
    ]


_NO_VERDICT: Mapping[str, Any] = {
    "clean_pred": UNJUDGED,
    "adv_pred": UNJUDGED,
    "adv8_pred": UNJUDGED,
    "clean_correct": None,
    "fooled": None,
    "flipped": None,
}


def _identity(cell: Cell, position: int, sample: str, label: int) -> Row:
    return {
        "cell": cell.id,
        "encoder": cell.encoder,
        "head": cell.head,
        "data": cell.data,
        "defense": cell.defense,
        "knowledge": cell.knowledge,
        "attack": cell.attack,
        "norm": cell.threat.norm,
        "eps": cell.threat.eps,
        "position": position,
        "sample": sample,
        "label": label,
    }
