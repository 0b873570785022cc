"""What every training stands on, whatever it learns: encoder, images, budget and seed; its key and its provenance."""

import datetime
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from robustbench_x import __version__
from robustbench_x.data.dataset import Item
from robustbench_x.encoders.encoder import Encoder, Preprocessing
from robustbench_x.errors import DataError
from robustbench_x.fitting.artifact import Artifact
from robustbench_x.fitting.loop import Show, Trained, run_training
from robustbench_x.fitting.stream import Stream, StreamedImages
from robustbench_x.plugin import Spec, Trainer
from robustbench_x.randomness import derive_seed
from robustbench_x.result import Provenance, Threat
from robustbench_x.threat import ThreatModel
from robustbench_x.views import ImagePool, Images, Meter
from robustbench_x.world import SINGLE, World

__all__ = ["Ground", "Job", "Pool", "code_digest", "device_name", "make_pool", "stream_pool"]

_PACKAGES = ("torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Surrogate images at one size: `levels` `(M, 3, H, W)` uint8, their source and digest.

    `starts` has the place of each file's first image, where a file gives several. Images that stay in their files are
    in `stream`, and then `levels` is empty and `sha256` is over the files.
    """

    source: str
    levels: Tensor
    sha256: str
    unreadable: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()
    stream: Stream | None = None

    def __len__(self) -> int:
        return len(self.levels) if self.stream is None else len(self.stream)

    @classmethod
    def empty(cls, input_size: tuple[int, int]) -> "Pool":
        """No image of that (height, width): what is made of an encoder's weights alone."""
        return cls(source="none", levels=torch.empty((0, 3, *input_size), dtype=torch.uint8), sha256="")


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


def stream_pool(source: str, items: Sequence[Item], preprocessing: Preprocessing, sha256: str) -> Pool:
    """`items` for one encoder, decoded when asked for; `sha256` is their `stream_digest`."""
    stream = Stream(source, items, preprocessing)
    empty = torch.empty((0, 3, *preprocessing.input_size), dtype=torch.uint8)
    return Pool(source=source, levels=empty, sha256=sha256, stream=stream)


class Job(Protocol):
    """A training as the engine runs it, whatever it learns."""

    @property
    def name(self) -> str:
        """The plugin's."""

    @property
    def ground(self) -> "Ground":
        """What it stands on."""

    @property
    def untouchable(self) -> tuple[nn.Module, ...]:
        """Models that it must leave as they are."""

    def cache_key(self) -> str:
        """A digest of everything that decides it, for files that never leave this machine."""

    def run(self, checkpoint: Path | None, show: Show | None = None, *, every: float = 20.0) -> Artifact:
        """Trains, from the checkpoint where there is one; SampleError when the training broke down."""


@final
@dataclass(frozen=True, kw_only=True)
class Ground:
    """The part of a training that is no plugin's. `public` and `partners` stand on `device`.

    `public` is the encoder that is fitted on, None for a defence that serves them all. `threat` is a budget of zero for
    a defence, which learns from clean images alone. `world` has the processes that train; `losses` is a file for the
    losses of every step.
    """

    public: Encoder | None
    pool: Pool
    threat: ThreatModel
    seed: int
    device: torch.device
    bf16: bool = False
    partners: tuple[Encoder, ...] = ()
    world: World = SINGLE
    losses: Path | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder that is fitted on."""
        assert self.public is not None, "this training stands on no encoder"
        return self.public

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        """All of them, the one that is fitted on first."""
        return (*([] if self.public is None else [self.public]), *self.partners)

    def key(self, spec: Spec, params: Mapping[str, Any], *more: object) -> str:
        """A digest of everything that decides the training, the same on every machine and device.

        Weights, images, parameters, and the code of this package and of the plugin; the code of a `python:` encoder
        shows in `cache_key` only. `more` is what else decides it, as plain values.
        """
        threat = self.threat
        parts = [
            code_digest("robustbench_x"),
            [spec.name, code_digest(spec.factory.__module__)],
            params,
            [[encoder.sha256, encoder.input_size] for encoder in self.encoders],
            [self.pool.sha256, len(self.pool)],
            [threat.norm, threat.eps, threat.placement if threat.norm == "patch" else ""],
            [self.seed, self.bf16],
            more,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def cache_key(self, key: str) -> str:
        """`key`, and what the encoders answer here: for files that never leave this machine."""
        answers = [self._fingerprint(encoder) for encoder in self.encoders]
        return hashlib.sha256("\n".join([key, *answers]).encode()).hexdigest()

    def plugin_seed(self, name: str) -> int:
        """A place of its own for each plugin, as in the audit, so that two never share their draws."""
        return derive_seed(self.seed, "fit", name)

    def surrogate(self) -> Images:
        """The images as a plugin is handed them."""
        if self.pool.stream is not None:
            return StreamedImages(self.pool.stream, device=self.device)
        return ImagePool(self.pool.levels, device=self.device)

    def train(
        self,
        make: Callable[[], Trainer],
        name: str,
        meter: Meter,
        *,
        key: str,
        checkpoint: Path | None,
        show: Show | None,
        every: float,
    ) -> Trained:
        """Runs a training of the plugin `name` to its end; see `run_training`."""
        return run_training(
            make,
            pool=len(self.pool),
            seed=self.plugin_seed(name),
            meter=meter,
            device=self.device,
            checkpoint=checkpoint,
            key=key if checkpoint is None else self.cache_key(key),
            every=every,
            show=show,
            stream=self.pool.stream,
            world=self.world,
            losses_to=self.losses,
        )

    def provenance(self, spec: Spec, params: Mapping[str, Any], key: str, trained: Trained, **more: Any) -> Provenance:
        """What the artefact of a finished training says of itself; `more` are the fields of one kind of training."""
        threat, public = self.threat, self.public
        height, width = self.pool.levels.shape[-2:]
        return Provenance(
            plugin=spec.name,
            version=__version__,
            encoder="none" if public is None else public.source,
            encoder_sha256="" if public is None else public.sha256,
            input_size=(height, width) if public is None else public.input_size,
            partners=tuple(encoder.source for encoder in self.partners),
            partners_sha256=tuple(encoder.sha256 for encoder in self.partners),
            surrogate=self.pool.source,
            surrogate_sha256=self.pool.sha256,
            surrogate_samples=len(self.pool),
            threat=Threat(
                norm=threat.norm, eps=threat.eps, placement=threat.placement if threat.norm == "patch" else None
            ),
            params=dict(params),
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
            streamed=self.pool.stream is not None,
            surrogate_unreadable=len(self.pool.unreadable) + len(trained.lost),
            processes=self.world.size,
            **more,
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
