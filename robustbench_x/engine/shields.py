"""The defences of a stage, ready to deploy: trained where they learn, with a threshold where they detect."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustbench_x.config import AuditConfig
from robustbench_x.data.dataset import Dataset
from robustbench_x.encoders.encoder import Encoder, features_of_looks
from robustbench_x.engine.supply import Supplied, Supply
from robustbench_x.errors import SampleError, SourceError
from robustbench_x.fitting.defense_job import CALIBRATION
from robustbench_x.fitting.imitation import arm_imitation
from robustbench_x.plan import Stage
from robustbench_x.plugin import DefenseSpec
from robustbench_x.registry import Registry
from robustbench_x.result import DefenseInfo, FitInfo
from robustbench_x.victim import Shield, Threshold, fresh_draw

__all__ = ["arm_shields", "describe_shields", "set_threshold", "with_imitations"]

_TIMED = 8
_ROUNDS = 3


def arm_shields(
    config: AuditConfig, registry: Registry, supply: Supply, encoder: Encoder, dataset: Dataset
) -> tuple[dict[str, Shield], dict[str, FitInfo]]:
    """Every defence of the audit in front of `encoder`, by title, and what those that learn have learned.

    A defence that is fitted for an encoder learns from the training images of `dataset`, which the defender has; where
    there are none, from the surrogate images. One whose training fails is there with its failure, and whatever stands
    behind it becomes an error.

    Raises:
        UsageError: An artefact cannot be had or does not belong, or a parameter is wrong.
    """
    shields, learned = {}, {}
    for entry in config.defense:
        spec = registry.defenses[entry.name]
        built = spec.build(entry.params)
        if not spec.fits:
            shields[entry.title] = Shield(spec=spec, defense=built, learned=_digest(spec.reads(built)))
            continue
        try:
            found = supply.defense(spec, built, encoder, dataset)
            shields[entry.title] = _armed(spec, built, found, config, supply.device)
        except SampleError as error:
            supply.progress.say(f"{entry.title}: {error}")
            shields[entry.title] = Shield(spec=spec, defense=built, failure=str(error))
        else:
            learned[entry.title] = found.artifact.info(found.origin)
    return shields, learned


def _digest(files: Sequence[Path]) -> str:
    """A digest of what a defence reads; empty for one that reads nothing. A missing file is the defence's to name."""
    found = [path for path in files if path.is_file()]
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest() if found else ""


def _armed(spec: DefenseSpec, built: Any, found: Supplied, config: AuditConfig, device: torch.device) -> Shield:
    """The defence with what it learned.

    Raises:
        SourceError: The file that was asked for is not what the defence needs.
        SampleError: What was trained for this audit is not.
    """
    tensors = {name: t.to(device) for name, t in found.artifact.tensors.items() if name != CALIBRATION}
    fault = SourceError if built.artifact else SampleError
    try:
        defense = built.armed(tensors)
    except (Exception, SystemExit) as error:
        what = f"what {spec.name} learned ({found.origin})"
        raise fault(f"{what} cannot be used: {type(error).__name__}: {error}") from error
    threshold = None
    if spec.detects:
        if CALIBRATION not in found.artifact.tensors:
            raise fault(f"{found.origin} holds no scores of clean images to set a threshold by")
        threshold = set_threshold(found.artifact.tensors[CALIBRATION], config.refuse_rate)
    return Shield(spec=spec, defense=defense, learned=found.artifact.sha256, threshold=threshold)


def set_threshold(scores: Tensor, rate: float) -> Threshold:
    """The score above which a share `rate` of clean images is refused, from those of held-out ones, sorted `(M,)`.

    The order statistic of conformal prediction: on as many new clean images as were held out, the refused share is at
    most `rate` on average. With too few held out for that rate, nothing below the largest score is refused.
    """
    count = len(scores)
    # Less a rounding error: 0.59 * 100 is a little more than 59.
    place = min(math.ceil((1 - rate) * (count + 1) - 1e-9), count) - 1
    spread = float(scores.std(correction=0)) if count > 1 else 0.0
    return Threshold(refuse_above=float(scores[place]), spread=spread if spread > 0 else 1.0)


def with_imitations(
    shields: Mapping[str, Shield], stage: Stage, config: AuditConfig, supply: Supply, encoder: Encoder
) -> dict[str, Shield]:
    """`shields` with an imitation for each that an attacker of `stage` passes gradients through one of.

    Where the training of one fails, its shield says so, and that attacker's cells become errors; no other's do.
    """
    needed = {craft.seen for craft in stage.crafts if craft.knowledge == "bpda_learned"}
    params = {entry.title: entry.params for entry in config.defense}
    armed = dict(shields)
    for title in sorted(title for title in needed if not shields[title].failure):
        try:
            found = supply.imitation(shields[title], params[title], encoder)
            imitation = arm_imitation(found.artifact.tensors, supply.device)
        except SampleError as error:
            supply.progress.say(f"{title}: {error}")
            armed[title] = dataclasses.replace(shields[title], unimitated=str(error))
        else:
            armed[title] = dataclasses.replace(shields[title], imitation=imitation)
    return armed


def describe_shields(
    shields: Mapping[str, Shield],
    learned: Mapping[str, FitInfo],
    *,
    stage: Stage,
    config: AuditConfig,
    encoder: Encoder,
    images: Tensor,
) -> list[DefenseInfo]:
    """What the report says of each defence, with what it costs on a few `images` in front of `encoder`."""
    images = images[:_TIMED]
    alone = _seconds(lambda: features_of_looks(encoder, images), images)
    entries = {entry.title: entry for entry in config.defense}
    return [
        DefenseInfo(
            encoder=stage.encoder,
            data=stage.data,
            defense=title,
            name=shield.spec.name,
            params=shield.spec.effective(entries[title].params) | (learned[title].params if title in learned else {}),
            gradient=shield.spec.gradient,
            stochastic=shield.spec.stochastic,
            detects=shield.spec.detects,
            refuse_above=None if shield.threshold is None else shield.threshold.refuse_above,
            seconds=_defended_seconds(shield, encoder, images),
            encoder_seconds=alone,
            fit=learned.get(title),
        )
        for title, shield in shields.items()
    ]


def _defended_seconds(shield: Shield, encoder: Encoder, images: Tensor) -> float | None:
    """Seconds an image through the defence and the encoder; None where it fails, which the probes report."""

    def run() -> None:
        features_of_looks(encoder, shield.apply(images))
        if shield.spec.detects:
            shield.score(images, encoder)

    try:
        with fresh_draw(0, images.device):
            return _seconds(run, images)
    except (Exception, SystemExit):  # noqa: BLE001 - the same images are probed, and there it is a finding
        return None


@torch.no_grad()
def _seconds(run: Any, images: Tensor) -> float | None:
    """Shortest of a few rounds, per image; None for no image."""
    if not len(images):
        return None
    best = math.inf
    run()  # what is built on first use is no part of the cost
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        run()
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        best = min(best, time.perf_counter() - started)
    return best / len(images)
