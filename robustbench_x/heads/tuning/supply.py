"""A tuned victim from the cache, or trained now and cached."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from robustbench_x import cache
from robustbench_x.encoders.encoder import Encoder
from robustbench_x.fitting.ground import code_digest
from robustbench_x.heads import _training, linear
from robustbench_x.heads.features import Features, content_digest, fingerprint
from robustbench_x.heads.tuning.overlay import join_tensors, rebuild, split_tensors
from robustbench_x.heads.tuning.recipe import Tell
from robustbench_x.heads.tuning.scheme import Scheme
from robustbench_x.heads.tuning.tune import Tuned, tune

__all__ = ["TunedVictim", "supply_tuned"]


class TunedVictim(NamedTuple):
    """What a tuned head is made of, on the CPU."""

    encoder: Encoder
    layer: nn.Module
    changed: tuple[str, ...]
    """Names in the tuned backbone's state dict that the public one lacks or has otherwise."""
    settings: dict[str, Any]


def supply_tuned(
    scheme: Scheme,
    encoder: Encoder,
    found: Features,
    *,
    num_classes: int,
    seed: int,
    device: torch.device,
    batch_size: int,
    tell: Tell,
) -> TunedVictim:
    """The victim that `tune` makes of these very arguments, now or earlier.

    The key digests the scheme with its settings and the code that trains, the public weights and what they answer here,
    the pixels, the labels and the seed. Another device answers in other last bits, so it trains a victim of its own;
    the batch size outside the training is no part of it.

    Raises:
        RobustbenchError: As `tune`.
    """
    assert found.levels is not None, "the pixels were not asked for"
    asked = {**scheme.settings, **scheme.packages()}
    key = "tuned-" + content_digest(
        json.dumps(asked, sort_keys=True),
        _code(),
        *(code_digest(part.__module__) for part in (scheme.attach, scheme.shape, scheme.settle)),
        encoder.sha256,
        fingerprint(encoder, device),
        tuple(found.levels.shape),
        found.levels,
        found.labels,
        num_classes,
        seed,
    )
    stored = cache.load(key)
    if stored:
        settings: dict[str, Any] = json.loads(stored.metadata["settings"])
        classifier, overlay = split_tensors(stored.tensors)
        made = Tuned(classifier, overlay, settings)
    else:
        made = tune(
            scheme,
            encoder,
            found,
            num_classes=num_classes,
            seed=seed,
            device=device,
            batch_size=batch_size,
            tell=tell,
        )
        cache.save(key, join_tensors(made.classifier, made.overlay), {"settings": json.dumps(made.settings)})
    # From what is stored in either case, so that a victim from the cache is the fresh one to the last bit.
    tuned = rebuild(scheme, encoder, made.overlay, sha256=made.settings["tuned_sha256"])
    return TunedVictim(
        encoder=tuned,
        layer=linear.restore(made.classifier),
        changed=tuple(sorted(made.overlay)),
        settings={**made.settings, "cache_key": key},
    )


@functools.cache
def _code() -> str:
    """A digest of the source that decides a training: this package, the probe and the split."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(linear.__file__), Path(_training.__file__)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
