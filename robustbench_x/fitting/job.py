"""One training as the harness sets it up: what is handed over, what identifies it, what its artefact says."""

import datetime
import functools
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from robustbench_x import __version__
from robustbench_x.data.dataset import Item
from robustbench_x.encoders.encoder import Encoder, Preprocessing
from robustbench_x.errors import DataError
from robustbench_x.fitting.artifact import Artifact
from robustbench_x.fitting.loop import Show, run_training
from robustbench_x.plugin import AttackSpec, FittedAttack
from robustbench_x.randomness import derive_seed
from robustbench_x.result import Provenance, Threat
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import Shield, perceive
from robustbench_x.views import EncoderHandle, FitView, ImagePool, Knowledge, Meter

__all__ = ["FitJob", "Pool", "code_digest", "device_name", "make_pool"]

_PACKAGES = ("torch", "torchvision", "timm", "numpy")
_PLACES = ("artifact", "fit_encoder")
"""Parameters that say where an artefact comes from, not what it is."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Surrogate images at one encoder's input size: `levels` `(M, 3, H, W)` uint8, their source and digest."""

    source: str
    levels: Tensor
    sha256: str
    unreadable: tuple[str, ...] = ()


def make_pool(source: str, items: Sequence[Item], preprocessing: Preprocessing) -> Pool:
    """Decodes `items` for one encoder; what cannot be read is left out and named.

    Raises:
        DataError: No image is readable.
    """
    levels, unreadable = [], []
    for item in items:
        try:
            levels.append(preprocessing(item.load()).mul(255).round().to(torch.uint8))
        except DataError as error:
            unreadable.append(str(error))
    if not levels:
        raise DataError(f"surrogate {source}: none of {len(items)} images is readable: {unreadable[0]}")
    stacked = torch.stack(levels)
    digest = hashlib.sha256(stacked.numpy().tobytes()).hexdigest()
    return Pool(source=source, levels=stacked, sha256=digest, unreadable=tuple(unreadable))


@final
@dataclass(frozen=True, kw_only=True)
class FitJob:
    """Everything a training depends on.

    `shield` and `knowledge` are the defence as the attacker has it: what it is fitted through. `encoder` and
    `partners` stand on `device`.
    """

    spec: AttackSpec
    attack: FittedAttack[Any]
    encoder: Encoder
    pool: Pool
    threat: ThreatModel
    seed: int
    device: torch.device
    bf16: bool = False
    shield: Shield | None = None
    shield_title: str = "none"
    shield_params: Mapping[str, Any] | None = None
    knowledge: Knowledge = "none"
    partners: tuple[Encoder, ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        """The attack's parameters as far as they decide what is learned."""
        return {p.name: getattr(self.attack, p.name) for p in self.spec.params if p.name not in _PLACES}

    def key(self) -> str:
        """A digest of everything that decides the training, the same on every machine and device.

        Weights, images, parameters, and the code of this package and of the plugins; the code of a `python:` encoder
        shows in `cache_key` only.
        """
        threat, shield = self.threat, self.shield
        parts = [
            code_digest("robustbench_x"),
            [self.spec.name, code_digest(self.spec.factory.__module__)],
            self.params,
            [[encoder.sha256, encoder.input_size] for encoder in (self.encoder, *self.partners)],
            [self.pool.sha256, len(self.pool.levels)],
            [threat.norm, threat.eps, threat.placement if threat.norm == "patch" else ""],
            [] if shield is None else [shield.spec.name, code_digest(type(shield.defense).__module__)],
            [dict(self.shield_params or {}), self.knowledge],
            [self.seed, self.bf16],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def cache_key(self) -> str:
        """`key`, and what the encoders answer here: for files that never leave this machine."""
        answers = [self._fingerprint(encoder) for encoder in (self.encoder, *self.partners)]
        return hashlib.sha256("\n".join([self.key(), *answers]).encode()).hexdigest()

    def run(self, checkpoint: Path | None, show: Show | None = None, *, every: float = 20.0) -> Artifact:
        """Trains, from the checkpoint where there is one.

        Raises:
            SampleError: The training broke down.
        """
        meter, key = Meter(), self.key()
        view = self.view(meter)
        trained = run_training(
            lambda: self.attack.trainer(view),
            pool=len(view.surrogate),
            seed=view.seed,
            meter=meter,
            device=self.device,
            checkpoint=checkpoint,
            key=key if checkpoint is None else self.cache_key(),
            every=every,
            show=show,
        )
        threat = self.threat
        provenance = Provenance(
            plugin=self.spec.name,
            version=__version__,
            encoder=self.encoder.source,
            encoder_sha256=self.encoder.sha256,
            input_size=self.encoder.input_size,
            partners=tuple(encoder.source for encoder in self.partners),
            partners_sha256=tuple(encoder.sha256 for encoder in self.partners),
            surrogate=self.pool.source,
            surrogate_sha256=self.pool.sha256,
            surrogate_samples=len(self.pool.levels),
            threat=Threat(
                norm=threat.norm, eps=threat.eps, placement=threat.placement if threat.norm == "patch" else None
            ),
            defense=self.shield_title,
            knowledge=self.knowledge,
            params=self.params,
            seed=self.seed,
            steps=trained.steps,
            precision="bf16" if self.bf16 else "fp32",
            device=device_name(self.device),
            seconds=round(trained.seconds, 3),
            forwards=trained.forwards,
            backwards=trained.backwards,
            losses=trained.losses,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            packages={name: version(name) for name in _PACKAGES},
            key=key,
        )
        return Artifact(trained.tensors, provenance)

    def view(self, meter: Meter) -> FitView:
        """What the plugin is handed."""
        # A place of its own for each attack, as in the audit, so that two attacks never share their draws.
        seed = derive_seed(self.seed, "fit", self.spec.name)
        through = perceive(self.shield, self.knowledge)
        stochastic = self.shield is not None and self.shield.spec.stochastic and self.knowledge in ("bpda", "full")

        def handle(encoder: Encoder) -> EncoderHandle:
            return EncoderHandle(encoder, through, meter, bf16=self.bf16, stochastic=stochastic)

        return FitView(
            encoder=handle(self.encoder),
            surrogate=ImagePool(self.pool.levels, device=self.device),
            threat=self.threat,
            seed=seed,
            device=self.device,
            partners=tuple(handle(encoder) for encoder in self.partners),
        )

    @torch.no_grad()
    def _fingerprint(self, encoder: Encoder) -> str:
        """Weights by digest, code by what it answers to two random images."""
        images = torch.rand(2, 3, *encoder.input_size, generator=torch.Generator().manual_seed(0))
        answer = encoder(images.to(self.device)).cpu()
        text = f"{encoder.sha256}:{encoder.input_size}:".encode()
        return hashlib.sha256(text + answer.contiguous().numpy().tobytes()).hexdigest()


@functools.cache
def code_digest(module: str) -> str:
    """A digest of every source file of the package that `module` lies in; of the module's own outside packages."""
    top = module.partition(".")[0]
    origin = getattr(sys.modules.get(top), "__file__", None)
    if origin is None:
        return top
    root = Path(origin)
    files = sorted(root.parent.rglob("*.py")) if root.name == "__init__.py" else [root]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root.parent).as_posix()}:".encode() + file.read_bytes())
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """A device as a report names it."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
