"""From the public encoder to a tuned victim: probe, copy, train, and back to plain weights."""

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder
from robustbench_x.errors import SampleError, SourceError
from robustbench_x.fitting.ground import device_name
from robustbench_x.heads import linear
from robustbench_x.heads._training import check_training, hold_out
from robustbench_x.heads.features import Features
from robustbench_x.heads.tuning.overlay import copied, overlay_of, rebuild
from robustbench_x.heads.tuning.recipe import Course, Lesson, Tell, predictions, train
from robustbench_x.heads.tuning.scheme import Attached, Scheme
from robustbench_x.randomness import derive_seed

__all__ = ["Tuned", "tune"]

_SAME = 1e-4
"""Largest difference, in shares of the largest value, that rounding may make between two ways to one result."""
_ALIKE = 2e-2
"""The same where the weights were merged and the device may round to TF32."""


class Tuned(NamedTuple):
    """A tuned victim as it is stored: the classifier, what differs from the public encoder, how it was made."""

    classifier: dict[str, Tensor]
    """State dict of an `nn.Linear`, on the CPU."""
    overlay: dict[str, Tensor]
    """The tensors of the tuned backbone's state dict that the public one lacks or has otherwise, on the CPU."""
    settings: dict[str, Any]


def tune(
    scheme: Scheme,
    encoder: Encoder,
    found: Features,
    *,
    num_classes: int,
    seed: int,
    device: torch.device,
    batch_size: int,
    tell: Tell,
) -> Tuned:
    """A copy of `encoder` fine-tuned by `scheme` on labelled images, under a linear classifier.

    Training starts from the linear probe of the public features, fitted on the very images that are trained on
    ("linear probing, then fine-tuning", Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution). That start is our choice: papers on attacks through tuned encoders rarely say theirs.
    `encoder` is not changed in any bit. A training that is killed starts again.

    Args:
        scheme: What of the copy is trained, and how.
        encoder: The public encoder, on `device`.
        found: Its features of the training images, and their pixels.
        num_classes: K.
        seed: Decides who is held out, initial weights and batches; the global generator is neither read nor moved.
        device: Where to train.
        batch_size: Images per forward pass outside the training.
        tell: Told about every step.

    Raises:
        MissingExtraError: The scheme needs a package that is not installed.
        DataError: A feature is not finite, or a class has no sample.
        SourceError: The encoder cannot be copied or has no place for the scheme.
        SampleError: The probe did not converge, or a loss was not finite.
    """
    scheme.require()
    assert found.levels is not None, "the pixels were not asked for"
    started = time.perf_counter()
    check_training(found.features, found.labels, num_classes)
    generator = torch.Generator().manual_seed(derive_seed(seed, "held out"))
    lesson = Lesson(found.levels, found.labels, *hold_out(found.labels, scheme.recipe.held_out, generator))
    tell("linear probe")
    probe = _probe(found, lesson.train, num_classes, seed, device)
    with _own_draws(seed, device):
        work = copied(encoder)
        scheme.shape(work)
        attached = scheme.attach(work, torch.Generator().manual_seed(derive_seed(seed, "weights")))
        _check_start(work, encoder, scheme)
        classifier = copy.deepcopy(probe).to(device)
        course = train(work, classifier, attached.weights, lesson, scheme.recipe, seed=seed, tell=tell)
        scheme.settle(work)
    overlay = overlay_of(work, scheme, encoder)
    tell("measuring the tuned victim")
    victim = rebuild(scheme, encoder, overlay).to(device)
    measured = _measure(victim, classifier, found, lesson, course, batch_size)
    return Tuned(
        classifier={name: tensor.detach().cpu() for name, tensor in classifier.state_dict().items()},
        overlay=overlay,
        settings={
            **scheme.settings,
            **scheme.packages(),
            "epochs_run": course.epochs,
            "best_epoch": course.best_epoch,
            **_counts(attached, overlay, lesson),
            **_probed(probe, found, lesson),
            **measured,
            "input_size": list(encoder.input_size),
            "tuned_sha256": victim.sha256,
            "device": device_name(device),
            "seconds": round(time.perf_counter() - started, 1),
        },
    )


@contextmanager
def _own_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Keeps what a library draws from the global generators out of the audit, and torch on its ordinary kernels.

    The fused kernel of `nn.TransformerEncoderLayer` reads the weights of its children without calling them, past any
    low-rank update.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _probe(found: Features, train: Tensor, num_classes: int, seed: int, device: torch.device) -> nn.Linear:
    # Only CUDA: other accelerators lack the float64 that a converged fit needs.
    place = device if device.type == "cuda" else torch.device("cpu")
    return linear.fit(found.features[train].to(place), found.labels[train].to(place), num_classes, seed).cpu()


@torch.no_grad()
def _check_start(work: Encoder, encoder: Encoder, scheme: Scheme) -> None:
    """A copy that is about to be trained must be the public encoder still, as a function."""
    images = torch.rand((2, 3, *encoder.input_size), generator=torch.Generator().manual_seed(0)).to(encoder.mean.device)
    expected = encoder(images)
    try:
        features = work(images)
    except Exception as error:
        raise SourceError(
            f"{encoder.source} does not run with {scheme.name} in it ({type(error).__name__}: {error}); try another "
            "tuned head, or head linear"
        ) from error
    if not _close(features, expected, _SAME):
        raise SourceError(f"{encoder.source} does not compute the same features once it is copied; use head linear")


def _measure(
    victim: Encoder, classifier: nn.Linear, found: Features, lesson: Lesson, course: Course, batch_size: int
) -> dict[str, Any]:
    """Figures of the victim as it will be audited: rebuilt from what is stored, not as the training left it."""
    features = predictions(victim, nn.Identity(), lesson.levels, batch_size)
    logits = F.linear(features, classifier.weight.cpu(), classifier.bias.cpu())
    held_out, labels = lesson.held_out, lesson.labels
    if not _close(logits[held_out], course.held_out_logits, _ALIKE):
        raise SampleError("the tuned victim answers otherwise once its weights are stored; try another tuned head")
    hits = logits.argmax(dim=1) == labels
    return {
        "train_accuracy": _mean(hits[lesson.train]),
        "held_out_accuracy": _mean(hits[held_out]),
        "held_out_loss": float(F.cross_entropy(logits[held_out], labels[held_out])),
        "feature_cosine": _mean(F.cosine_similarity(features[held_out], found.features[held_out])),
    }


def _probed(probe: nn.Linear, found: Features, lesson: Lesson) -> dict[str, Any]:
    """What the training started from made of the held-out images."""
    logits, labels = probe(found.features[lesson.held_out]), lesson.labels[lesson.held_out]
    return {
        "probe_held_out_accuracy": _mean(logits.argmax(dim=1) == labels),
        "probe_held_out_loss": float(F.cross_entropy(logits, labels)),
    }


def _counts(attached: Attached, overlay: Mapping[str, Tensor], lesson: Lesson) -> dict[str, int]:
    return {
        "targets": attached.targets,
        "trainable_parameters": sum(weight.numel() for weight in attached.weights),
        "changed_tensors": len(overlay),
        "trained_on": len(lesson.train),
        "held_out_samples": len(lesson.held_out),
    }


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _close(found: Tensor, expected: Tensor, slack: float) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= slack * expected.abs().max().clamp_min(1e-6)
    )
