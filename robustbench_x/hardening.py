"""What a hardening plugin registers: training of an encoder on the images of any encoder-level attack, or on none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from robustbench_x.config import parse_value
from robustbench_x.errors import ConfigError, PluginError
from robustbench_x.plugin import AttackSpec, Spec, Trainer, check_common
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderHandle, Images

__all__ = [
    "AttackedHardening",
    "Examples",
    "HardenView",
    "Hardening",
    "HardeningSpec",
    "InnerName",
    "check_hardening",
    "split_inner",
]

Examples = Callable[[Tensor, int], Tensor]
"""Images `(N, 3, H, W)` in [0, 1] and the number of the step to adversarial images of the student as it stands."""


@dataclass(frozen=True, kw_only=True)
class HardenView:
    """What a hardening is handed: an encoder to train, its original, unlabelled images, and an attack.

    Args:
        student: The copy that is trained, in eval mode: batch norm keeps its statistics, dropout is off.
        backbone: The student's network; its floating-point parameters are the ones to train, and its state dict is
            what `Trainer.result` returns. The original is out of reach.
        teacher: The original encoder, frozen.
        surrogate: Unlabelled images of the encoder's input size; empty for a hardening without an attack.
        threat: The budget that `examples` spends; of eps 0 for a hardening without an attack.
        seed: All randomness of the training follows from it.
        device: Where everything stands.
        examples: Runs the inner attack on the student as it stands, frozen and metered, and returns its images
            projected to the budget, without a graph. The draws follow from the step and the place in the batch.
            SampleError when the attack fails, returns NaN or tampers with the student, or there is none.
    """

    student: EncoderHandle
    backbone: nn.Module
    teacher: EncoderHandle
    surrogate: Images
    threat: ThreatModel
    seed: int
    device: torch.device
    examples: Examples


class Hardening(Protocol):
    """Makes another encoder of one. A frozen dataclass whose fields are its parameters."""

    def trainer(self, view: HardenView) -> Trainer:
        """A training from its start; its `result` is the state dict of `view.backbone`."""


class AttackedHardening(Hardening, Protocol):
    """Trains an encoder on adversarial images.

    `inner` is one of its parameters: the attack that makes them, with its own parameters, as `split_inner` reads it.
    """

    @property
    def inner(self) -> str:
        """The attack by name, for example `embed?loss=l2&steps=10`."""


@dataclass(frozen=True, kw_only=True)
class HardeningSpec(Spec):
    """A hardening as the registry knows it.

    Args:
        name: Lower-case; no attack has it.
        summary: One line for the catalogue.
        factory: A frozen dataclass with a method `trainer(view)`, and a parameter `inner` where `attacked`.
        source: Paper or origin.
        eps: The linf budget of `rbx fit` where none is given, as a user writes it.
        attacked: Trains on the images of an attack. Else it changes the weights alone, by no image, attack or budget,
            and the same whatever the seed.
        reads: Files of a built hardening whose content decides what is learned.
    """

    eps: str = "4/255"
    attacked: bool = True
    reads: Callable[[Any], tuple[Path, ...]] = lambda hardening: ()


class InnerName(NamedTuple):
    """The inner attack of a hardening as it was asked for: its name, and the parameters that were set."""

    name: str
    params: dict[str, Any]


def split_inner(asked: str) -> InnerName:
    """`NAME?param=value&param=value` as its parts; values are read as `-p` reads them.

    >>> split_inner("embed?loss=l2&steps=10")
    InnerName(name='embed', params={'loss': 'l2', 'steps': 10})

    Raises:
        ConfigError: There is no name, or a parameter has no value.
    """
    name, _, query = asked.partition("?")
    pairs = [entry.partition("=") for entry in query.split("&")] if query else []
    if not name or not all(key and equals and value for key, equals, value in pairs):
        raise ConfigError(f"inner={asked!r}: write an attack and its parameters as embed?loss=l2&steps=10")
    return InnerName(name, {key: parse_value(value) for key, _, value in pairs})


def check_hardening(spec: HardeningSpec, attacks: Mapping[str, AttackSpec]) -> None:
    """Refuses a malformed spec at registration.

    Raises:
        PluginError: What `check_common` refuses, a missing or idle parameter `inner`, or the name of an attack, since
            `rbx fit` takes both.
    """
    where = f"hardening '{spec.name}'"
    check_common(where, spec, ("trainer",))
    inner = [p for p in spec.params if p.name == "inner"]
    if spec.attacked and not any(isinstance(p.default, str) for p in inner):
        raise PluginError(f"{where}: it has no parameter 'inner' that names its attack")
    if inner and not spec.attacked:
        raise PluginError(f"{where}: it has a parameter 'inner', but says attacked=False, so no attack would run")
    if spec.name in attacks:
        raise PluginError(f"{where}: an attack has this name already, and rbx fit takes both; choose another")
