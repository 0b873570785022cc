"""Proof of what was evaluated: nothing measured on one model or image is ever shown for another."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbench_x.encoders.encoder import features_of_looks
from robustbench_x.engine.isolation import isolated
from robustbench_x.engine.stage import StageAtWork
from robustbench_x.plan import Stage
from robustbench_x.result import DataInfo, EncoderInfo, HeadInfo, StageProof
from robustbench_x.victim import Shield

__all__ = ["changed", "proof_of", "same_answers", "same_proof", "stage_notes"]


def proof_of(stage: StageAtWork) -> StageProof:
    """What `stage` evaluates, in digests and answers."""
    return StageProof(
        encoder=stage.stage.encoder,
        data=stage.stage.data,
        sha256=stage.encoder.sha256,
        images=stage.data_digest(),
        answers={name: tuple(values) for name, values in stage.answers().items()},
        tuned={name: head.encoder.sha256 for name, head in stage.heads.items() if head.encoder is not None},
        defenses={title: shield.learned for title, shield in stage.shields.items() if shield and shield.learned},
        shields={title: _shield_answers(stage, title, shield) for title, shield in stage.shields.items() if shield},
        texts=stage.texts(),
        drawn={t: stage.device.type for t, shield in stage.shields.items() if shield and shield.spec.stochastic},
    )


@torch.no_grad()
def _shield_answers(stage: StageAtWork, title: str, shield: Shield) -> dict[str, tuple[float, ...]]:
    """What one defence makes of the fixed images, its randomness seeded: one pass through it, one through the encoder.

    `pixels` is what it changes in them, `features` what the encoder behind it answers, `acceptance` a detector's, and
    `stand_in` what lends a defence its gradient. What fails has no answer, and that it failed is the proof.
    """
    images = stage.probe_images()
    answers: dict[str, tuple[float, ...]] = {}

    def ask(name: str, make: Callable[[], Tensor]) -> Tensor | None:
        try:
            with isolated(0, stage.device):
                made = make()
                answers[name] = _projected(made)
        except (Exception, SystemExit):  # noqa: BLE001 - the probes and the error rows say so
            return None
        return made

    seen = ask("pixels", lambda: shield.apply(images))
    if seen is not None:
        if seen.shape == images.shape:  # the change alone: next to the image itself a small one would drown
            answers["pixels"] = _projected(seen - images)
        ask("features", lambda: features_of_looks(stage.encoder, seen))
    if shield.threshold is not None:
        victim = stage.defended(title, next(iter(stage.heads)))
        ask("acceptance", lambda: victim.acceptance(images))
    if shield.spec.gradient == "stand-in":
        ask("stand_in", lambda: shield.defense.stand_in(images.clone()))  # type: ignore[attr-defined]  # registered so
    return answers


def _projected(made: Tensor) -> tuple[float, ...]:
    """Four fixed projections of each row, of the size of a typical entry; few entries are given as they are."""
    rows = made.detach().float().cpu().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).flatten(1 if made.ndim > 1 else 0)
    if rows.ndim == 1:
        return tuple(rows.tolist())
    directions = torch.randn(rows.shape[1], 4, generator=torch.Generator().manual_seed(1)) / rows.shape[1] ** 0.5
    return tuple((rows @ directions).flatten().tolist())


def same_proof(stored: StageProof, now: StageProof) -> bool:
    """Whether two proofs are of the same weights, images and answers.

    Tuned weights count to the bit: trained again elsewhere, they answer alike and are another victim all the same.
    """
    mine, theirs = ((p.sha256, p.images, p.tuned, p.defenses, p.texts) for p in (now, stored))
    return mine == theirs and same_answers(stored, now)


def same_answers(stored: StageProof, now: StageProof) -> bool:
    """Whether the victims answer alike, and the defences in front of them.

    Within rounding: another device or thread count is no other victim. What a random defence draws on another kind of
    device cannot be compared.
    """
    if not _alike(stored.answers, now.answers):
        return False
    if stored.shields is None or now.shields is None:  # from before the defences were asked
        return True
    elsewhere = {title for title in now.drawn if title in stored.drawn and now.drawn[title] != stored.drawn[title]}
    return (stored.shields.keys(), stored.drawn.keys()) == (now.shields.keys(), now.drawn.keys()) and all(
        _alike(stored.shields[title], now.shields[title]) for title in now.shields if title not in elsewhere
    )


def _alike(theirs: Mapping[str, Sequence[float]], mine: Mapping[str, Sequence[float]]) -> bool:
    return mine.keys() == theirs.keys() and all(
        np.shape(theirs[name]) == np.shape(mine[name])
        and np.allclose(theirs[name], mine[name], rtol=1e-2, atol=_room(mine[name]))
        for name in mine
    )


def _room(values: Sequence[float]) -> float:
    """A hundredth of the largest; below a millionth everything is rounding."""
    return max(1e-2 * float(np.abs(values).max(initial=0)), 1e-6)


def changed(stage: Stage) -> str:
    """The middle of the sentence that refuses a changed victim."""
    what = f"the weights, code, heads or defenses of {stage.encoder} or the images or captions of {stage.data}"
    return f"{what} changed since this audit was"


def stage_notes(stage: StageAtWork) -> dict[str, Any]:
    """What the report says about a stage, as plain values."""
    encoder, dataset = stage.encoder, stage.dataset
    return {
        "proof": proof_of(stage).model_dump(mode="json"),
        "encoder": EncoderInfo(
            source=stage.stage.encoder,
            sha256=encoder.sha256,
            parameters=encoder.num_parameters,
            input_size=encoder.input_size,
            mean=encoder.preprocessing.mean,
            std=encoder.preprocessing.std,
            license=encoder.license,
            notes=encoder.notes,
        ).model_dump(mode="json"),
        "heads": [
            HeadInfo(
                encoder=stage.stage.encoder,
                data=stage.stage.data,
                head=name,
                num_classes=head.num_classes,
                settings=head.settings,
                task=head.task,
                classes=head.class_names,
            ).model_dump(mode="json")
            for name, head in stage.heads.items()
        ],
        "data": DataInfo(
            source=stage.stage.data,
            classes=len(dataset.classes),
            train=len(dataset.train),
            test=len(dataset.test),
            evaluated=len(stage.items),
            unreadable=stage.unreadable(),
            license=dataset.license,
            notes=dataset.notes,
        ).model_dump(mode="json"),
        "defenses": [info.model_dump(mode="json") for info in stage.defenses()],
    }
