"""The training loop of a tuned victim: AdamW, a held-out share, the epoch that is best on it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder
from robustbench_x.errors import SampleError, SourceError
from robustbench_x.randomness import derive_seed

__all__ = ["Course", "Lesson", "Recipe", "Tell", "predictions", "share_of_rate", "train"]

Tell = Callable[[str], None]
"""Told in a few words what is being done."""


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a tuned victim is trained.

    From the linear probe of the public features (linear probing, then fine-tuning: Kumar et al. 2022; our choice) by
    AdamW on mini-batches of `batch` images as they are, without augmentation. The encoder stays in eval mode: batch
    norm keeps its public statistics, dropout is off. Gradients are clipped to norm `clip`; both rates rise linearly
    over a share `warmup` of all steps of `epochs`, then fall by half a cosine. A stratified share `held_out` of the
    training images is not trained on: training stops after `patience` epochs without progress on its cross-entropy,
    and the weights of the best epoch stay, even where the probe was better.
    """

    encoder_rate: float
    classifier_rate: float = 1e-4
    epochs: int = 4
    patience: int = 2
    batch: int = 32
    held_out: float = 0.1
    decay: float = 0.01
    clip: float = 1.0
    warmup: float = 0.1


class Lesson(NamedTuple):
    """What is learned from: `levels` `(N, 3, H, W)` uint8 and `labels` `(N,)` int64 on the CPU, and who is held out."""

    levels: Tensor
    labels: Tensor
    train: Tensor
    """Indices that are trained on."""
    held_out: Tensor
    """Indices that decide which epoch is best."""


class Course(NamedTuple):
    """How a training went: epochs run, the best of them, and what the victim then made of the held-out images."""

    epochs: int
    best_epoch: int
    held_out_logits: Tensor
    """`(M, K)` on the CPU."""


@torch.enable_grad()
def train(
    encoder: Encoder,
    classifier: nn.Linear,
    weights: Sequence[nn.Parameter],
    lesson: Lesson,
    recipe: Recipe,
    *,
    seed: int,
    tell: Tell,
) -> Course:
    """Trains `weights` of `encoder` and `classifier`, which both end as they were after the best epoch.

    The encoder stays in eval mode: batch norm uses the public statistics, dropout and stochastic depth are off. The
    best epoch is the one with the lowest held-out cross-entropy, even where that is above the one before training.

    Args:
        encoder: The copy, on the device; changed in place.
        classifier: On the same device; changed in place.
        weights: What may change in the encoder.
        lesson: The images.
        recipe: How.
        seed: Decides the batches.
        tell: Told after every step.

    Raises:
        SourceError: The features do not depend on `weights`.
        SampleError: A loss is not finite.
    """
    device = classifier.weight.device
    classifier.requires_grad_(True)
    trained = [*weights, *classifier.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(weights), "lr": recipe.encoder_rate},
            {"params": list(classifier.parameters()), "lr": recipe.classifier_rate},
        ],
        weight_decay=recipe.decay,
    )
    steps = recipe.epochs * math.ceil(len(lesson.train) / recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, steps, recipe.warmup))
    best: list[Tensor] = []
    best_loss, best_epoch, epoch = math.inf, 0, 0
    logits = torch.empty(0)
    while epoch < recipe.epochs and epoch - best_epoch < recipe.patience:
        epoch += 1
        generator = torch.Generator().manual_seed(derive_seed(seed, "batches", epoch))
        order = lesson.train[torch.randperm(len(lesson.train), generator=generator)]
        for start in range(0, len(order), recipe.batch):
            index = order[start : start + recipe.batch]
            optimizer.zero_grad()
            images = lesson.levels[index].to(device).float().div(255)
            loss = F.cross_entropy(classifier(encoder(images)), lesson.labels[index].to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            if all(weight.grad is None for weight in weights):
                raise SourceError(f"{encoder.source} cannot be tuned: its features do not depend on the copied weights")
            nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            schedule.step()
            where = f"epoch {epoch} of {recipe.epochs}, {start + len(index)} of {len(order)} images"
            tell(f"{where}, loss {_finite(float(loss.detach()), where):.4f}")
        found = predictions(encoder, classifier, lesson.levels[lesson.held_out], recipe.batch)
        held_out = _finite(float(F.cross_entropy(found, lesson.labels[lesson.held_out])), f"epoch {epoch}, held out")
        tell(f"epoch {epoch} of {recipe.epochs}, held-out loss {held_out:.4f}")
        if held_out < best_loss:
            best, best_loss, best_epoch, logits = [t.detach().clone() for t in trained], held_out, epoch, found
    with torch.no_grad():
        for weight, kept in zip(trained, best, strict=True):
            weight.copy_(kept)
    classifier.requires_grad_(False)
    return Course(epoch, best_epoch, logits)


@torch.no_grad()
def predictions(encoder: Encoder, classifier: nn.Module, levels: Tensor, batch: int) -> Tensor:
    """Logits `(N, K)` on the CPU of `levels` `(N, 3, H, W)` uint8."""
    device = encoder.mean.device
    parts = [classifier(encoder(part.to(device).float().div(255))).cpu() for part in torch.split(levels, batch)]
    return torch.cat(parts)


def share_of_rate(step: int, steps: int, warmup: float) -> float:
    """The share of its rate that step `step` (from 0) of `steps` takes."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _finite(loss: float, where: str) -> float:
    if not math.isfinite(loss):
        raise SampleError(f"the fine-tuning broke down: at {where}, the loss is {loss}; a linear head needs none")
    return loss
