"""Who runs in the PGD benchmark: a hand-written loop, torchattacks, foolbox, ART and ours, behind one signature."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder
from robustbench_x.heads.base import FittedHead
from robustbench_x.plugin import Attack
from robustbench_x.randomness import SampleRandom, derive_seed
from robustbench_x.threat import ThreatModel
from robustbench_x.views import Meter, ModelHandle, WhiteboxView
from robustbench_x_attacks.gradient import APGDCE, PGD

SEED = 0
HAND = "hand-written loop"
OURS_ALL = "robustbench-x, exhaustive"
OURS_VERDICT = "robustbench-x, verdict"


@final
class Plain(nn.Module):
    """What a user of any library writes: normalise, network, classifier. Counts its passes."""

    def __init__(self, encoder: Encoder, head: FittedHead) -> None:
        super().__init__()
        self.encoder, self.head, self.meter = encoder, head, Meter()

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, K)` of images in [0, 1]."""
        net: Any = self.encoder.backbone
        features = net.pooled((images - self.encoder.mean) / self.encoder.std)
        return self.meter.count(self.head(features), len(images))


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A frozen encoder with its head, and what to attack."""

    title: str
    encoder: Encoder
    head: FittedHead
    images: Tensor
    labels: Tensor

    def logits(self, images: Tensor) -> Tensor:
        """The deployed victim, range checks included."""
        logits: Tensor = self.head(self.encoder(images))
        return logits


@dataclass(frozen=True, kw_only=True)
class Task:
    """One victim, one budget, one number of steps."""

    victim: Victim
    threat: ThreatModel
    steps: int

    @property
    def step_size(self) -> float:
        """Everyone's: 2.5 * eps / steps (Madry et al. 2018)."""
        return 2.5 * self.threat.eps / self.steps


@dataclass
class Run:
    """A prepared attack: `craft()` is timed; `meter` counts, `batches` lists the images of every forward pass."""

    craft: Callable[[], Tensor]
    meter: Meter
    batches: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A row: its label, how to prepare it, and the module it needs."""

    name: str
    prepare: Callable[[Task], Run]
    module: str = "torch"
    extra: str = ""


@dataclass
class Result:
    """Best times over the rounds, and what was measured on the last one."""

    name: str
    missing: str = ""
    seconds: float = math.inf
    cpu_seconds: float = math.inf
    robust_accuracy: float = math.nan
    forwards: float = math.nan
    backwards: float = math.nan
    batches: list[int] = field(default_factory=list)


def _plain(task: Task) -> Plain:
    return Plain(task.victim.encoder, task.victim.head).eval().requires_grad_(False)


def hand_written(task: Task) -> Run:
    """The loop everyone writes first."""
    model, images, labels = _plain(task), task.victim.images, task.victim.labels
    eps, step = task.threat.eps, task.step_size

    def craft() -> Tensor:
        adversarial = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(task.steps):
            adversarial.requires_grad_(True)
            loss = F.cross_entropy(model(adversarial), labels)
            (gradient,) = torch.autograd.grad(loss, adversarial)
            adversarial = adversarial.detach() + step * gradient.sign()
            adversarial = (images + (adversarial - images).clamp(-eps, eps)).clamp(0, 1)
        return adversarial

    return Run(craft, model.meter)


def torchattacks_pgd(task: Task) -> Run:
    """torchattacks.PGD."""
    import torchattacks

    model = _plain(task)
    attack = torchattacks.PGD(model, eps=task.threat.eps, alpha=task.step_size, steps=task.steps, random_start=True)
    return Run(lambda: attack(task.victim.images, task.victim.labels), model.meter)


def torchattacks_apgd(task: Task) -> Run:
    """torchattacks.APGD on the cross-entropy, one restart."""
    import torchattacks

    model = _plain(task)
    attack = torchattacks.APGD(model, norm="Linf", eps=task.threat.eps, steps=task.steps, n_restarts=1, loss="ce")
    return Run(lambda: attack(task.victim.images, task.victim.labels), model.meter)


def foolbox_pgd(task: Task) -> Run:
    """foolbox's LinfPGD; its public call ends with one more forward."""
    import foolbox

    model, images, labels = _plain(task), task.victim.images, task.victim.labels
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=task.step_size, steps=task.steps, random_start=True)
    return Run(lambda: attack(wrapped, images, labels, epsilons=task.threat.eps)[1], model.meter)


def art_pgd(task: Task) -> Run:
    """ART's PGD; its `generate` ends with two more forwards, for a log line."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model, images, labels = _plain(task), task.victim.images, task.victim.labels
    classifier = PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=task.victim.head.num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if images.is_cuda else "cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        norm=np.inf,
        eps=task.threat.eps,
        eps_step=task.step_size,
        max_iter=task.steps,
        num_random_init=1,
        batch_size=len(images),
        verbose=False,
    )
    pixels, classes = images.cpu().numpy(), labels.cpu().numpy()
    return Run(lambda: torch.from_numpy(attack.generate(x=pixels, y=classes)).to(images.device), model.meter)


def ours(make: Callable[[Task], Attack[WhiteboxView]], *, exhaustive: bool) -> Callable[[Task], Run]:
    """A native attack behind the view that an audit hands out."""

    def prepare(task: Task) -> Run:
        victim, meter, batches = task.victim, Meter(), list[int]()

        def logits(images: Tensor) -> Tensor:
            batches.append(len(images))
            return victim.logits(images)

        def craft() -> Tensor:
            view = WhiteboxView(
                inputs=victim.images.clone(),
                threat=task.threat,
                random=SampleRandom(
                    [derive_seed(SEED, i) for i in range(len(victim.images))], device=victim.images.device
                ),
                exhaustive=exhaustive,
                labels=victim.labels.clone(),
                model=ModelHandle(logits, meter),
                num_classes=victim.head.num_classes,
            )
            return make(task).run(view)

        return Run(craft, meter, batches)

    return prepare


def _pgd(task: Task) -> Attack[WhiteboxView]:
    return PGD(steps=task.steps, step_size=task.step_size)


def _apgd(task: Task) -> Attack[WhiteboxView]:
    return APGDCE(steps=task.steps)


PGD_ROWS = (
    Contender(name=HAND, prepare=hand_written),
    Contender(name="torchattacks.PGD", prepare=torchattacks_pgd, module="torchattacks", extra="torchattacks"),
    Contender(name="foolbox LinfPGD", prepare=foolbox_pgd, module="foolbox", extra="bench"),
    Contender(name="ART ProjectedGradientDescentPyTorch", prepare=art_pgd, module="art", extra="bench"),
    Contender(name=OURS_ALL, prepare=ours(_pgd, exhaustive=True)),
    Contender(name=OURS_VERDICT, prepare=ours(_pgd, exhaustive=False)),
)
APGD_ROWS = (
    Contender(name="torchattacks.APGD", prepare=torchattacks_apgd, module="torchattacks", extra="torchattacks"),
    Contender(name=OURS_ALL, prepare=ours(_apgd, exhaustive=True)),
    Contender(name=OURS_VERDICT, prepare=ours(_apgd, exhaustive=False)),
)
