"""What an attack is handed: the view of its access level, and the witness that the harness sets beside it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from robustbench_x.config import AuditConfig
from robustbench_x.encoders.encoder import Encoder, features_of_looks
from robustbench_x.engine.stage import Batch, StageAtWork
from robustbench_x.plan import Craft
from robustbench_x.plugin import Attack, AttackSpec
from robustbench_x.randomness import SampleRandom
from robustbench_x.victim import DefendedEncoder, perceive
from robustbench_x.views import (
    EncoderHandle,
    EncoderView,
    ImageView,
    Meter,
    ModelHandle,
    Perceive,
    Query,
    QueryView,
    View,
    WhiteboxView,
)
from robustbench_x.witness import Witness

__all__ = ["AttackAtWork", "Unwatched", "attacker_sees", "hand_out", "partner_handle", "run_partners", "unwatched"]


@dataclass(frozen=True, kw_only=True)
class AttackAtWork:
    """A craft with its built attack and what it may use.

    `failure` says why there is nothing to run: a fitted attack learned nothing, or the training of its defence failed.
    """

    craft: Craft
    spec: AttackSpec
    attack: Attack[Any]
    surrogate: Tensor | None
    artifact: Mapping[str, Tensor] | None = None
    failure: str | None = None
    partners: tuple[Encoder, ...] = ()


def attacker_sees(stage: StageAtWork, craft: Craft, head: str | None) -> Perceive:
    """Pixels to what the attacker's gradients run through: logits of `head`, or public features when it has none."""
    through = perceive(stage.shields[craft.seen], craft.knowledge)
    encoder = stage.body(head)
    if head is None:
        return lambda images: features_of_looks(encoder, through(images))
    top = stage.heads[head]
    return lambda images: top(features_of_looks(encoder, through(images)))


class Unwatched(NamedTuple):
    """Why nobody watches what an attack is answered; `mendable` where another precision could have had it."""

    reason: str
    mendable: bool


def unwatched(stage: StageAtWork, craft: Craft) -> Unwatched | None:
    """Why an attack that asks the victim is not watched; None where it is."""
    shield = stage.shields[craft.seen]
    if stage.config.precision == "bf16":
        return Unwatched("in bfloat16 an answer may be wrong by more than the witness's margin", mendable=True)
    if shield is not None and shield.spec.stochastic:
        return Unwatched("a random defence answers otherwise when it is judged", mendable=False)
    if shield is not None and shield.threshold is not None:
        return Unwatched("behind a detector a wrong answer alone is no success", mendable=False)
    return None


def hand_out(
    stage: StageAtWork,
    work: AttackAtWork,
    batch: Batch,
    part: slice,
    seeds: list[int],
    meter: Meter,
    config: AuditConfig,
) -> tuple[View, Witness | None]:
    """What this attack is handed (see `robustbench_x.views`), and who watches what it is answered.

    Nobody watches where the answers are not those of the victim it is judged on: without a head, behind a detector, and
    where the defence draws anew (`unwatched`).
    """
    craft, access = work.craft, work.spec.access
    bf16 = config.precision == "bf16"
    shared: dict[str, Any] = {
        "inputs": batch.images[part].clone(),
        # A copy: budget and verdict are the harness's own.
        "threat": dataclasses.replace(craft.threat),
        "random": SampleRandom(seeds, device=stage.device),
        "exhaustive": craft.exhaustive,
    }
    if access == "none":
        return ImageView(**shared), None
    shield = stage.shields[craft.seen]
    stochastic = shield is not None and shield.spec.stochastic
    if access == "encoder" or craft.head is None:
        through = perceive(shield, craft.knowledge)
        encoder = EncoderHandle(stage.encoder, through, meter, bf16=bf16, stochastic=stochastic, text=stage.text)
        surrogate = None if work.surrogate is None else work.surrogate.clone()
        learned = work.artifact
        artifact = None if learned is None else {k: t.to(stage.device, copy=True) for k, t in learned.items()}
        partners = tuple(partner_handle(partner, meter, bf16=bf16) for partner in work.partners)
        aim: dict[str, Any] = {}
        if work.spec.aims:
            items = batch.items[part]
            aim = {"targets": stage.targets.images(items).to(stage.device), "target_texts": stage.targets.texts(items)}
        view = EncoderView(**shared, **aim, encoder=encoder, surrogate=surrogate, artifact=artifact, partners=partners)
        return view, None
    head = stage.heads[craft.head]
    rows = list(batch.positions[part])
    shared |= {"labels": stage.labels[craft.head][rows].clone(), "num_classes": head.num_classes}
    deployed = stage.defended(craft.seen, craft.head)
    blind = unwatched(stage, craft) is not None
    witness = None if blind else Witness(batch.images[part], shared["labels"].clone(), craft.threat)
    watch = None if witness is None else witness.look
    if access == "whitebox":
        sees = attacker_sees(stage, craft, craft.head)
        handle = ModelHandle(sees, meter, bf16=bf16, stochastic=stochastic, watch=watch)
        evade = _evadable(deployed, meter) if deployed.detects and craft.knowledge == "full" else None
        return WhiteboxView(**shared, model=handle, detector=evade), witness
    cap = None if config.query_cap is None else config.query_cap * len(rows)
    query = Query(
        lambda images: deployed.logits(images, head),
        meter,
        answer="scores" if access == "scores" else "labels",
        cap=cap,
        stochastic=stochastic,
        watch=watch,
    )
    return QueryView(**shared, query=query), witness


def _evadable(victim: DefendedEncoder, meter: Meter) -> Perceive:
    """The detector as an attacker with full knowledge runs it; a look at it costs a pass."""
    return lambda images: meter.count(victim.acceptance(images), len(images))


def run_partners(spec: AttackSpec, attack: Any, encoder: str) -> tuple[str, ...]:
    """Sources of the encoders beside `encoder` that a built attack runs on.

    One that is fitted has its partners in its training; one that aims still reads its targets with the encoder that it
    was fitted on.
    """
    if not spec.fits:
        return spec.partners(attack)
    other = spec.aims and attack.fit_encoder not in ("", encoder)
    return (attack.fit_encoder,) if other else ()


def partner_handle(encoder: Encoder, meter: Meter, *, bf16: bool = False) -> EncoderHandle:
    """A further public encoder on images of the victim's size."""

    def resized(images: Tensor) -> Tensor:
        if images.shape[-2:] == encoder.input_size:
            return images
        small = F.interpolate(images, encoder.input_size, mode="bilinear", antialias=True, align_corners=False)
        return small.clamp(0, 1)

    return EncoderHandle(encoder, resized, meter, bf16=bf16)
