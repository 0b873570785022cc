"""Proof of what was evaluated: nothing measured on one model or image is ever shown for another."""

from typing import Any

import numpy as np

from robustbench_x.engine.stage import StageAtWork
from robustbench_x.plan import Stage
from robustbench_x.result import DataInfo, EncoderInfo, HeadInfo, StageProof

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
    )


def same_proof(stored: StageProof, now: StageProof) -> bool:
    """Whether two proofs are of the same weights, images and answers.

    Tuned weights count to the bit: trained again elsewhere, they answer alike and are another victim all the same.
    """
    mine, theirs = ((p.sha256, p.images, p.tuned, p.defenses) for p in (now, stored))
    return mine == theirs and same_answers(stored, now)


def same_answers(stored: StageProof, now: StageProof) -> bool:
    """Whether the victims answer alike, within rounding: another device or thread count is no other victim."""
    mine, theirs = now.answers, stored.answers
    return mine.keys() == theirs.keys() and all(
        np.shape(theirs[name]) == np.shape(mine[name])
        and np.allclose(theirs[name], mine[name], rtol=1e-2, atol=1e-2 * float(np.abs(mine[name]).max()))
        for name in mine
    )


def changed(stage: Stage) -> str:
    """The middle of the sentence that refuses a changed victim."""
    what = f"the weights, code, heads or defenses of {stage.encoder} or the images of {stage.data}"
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
