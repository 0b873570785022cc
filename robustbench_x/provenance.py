"""What an artefact stores of its training, and the small pieces that every stored document is made of."""

from typing import Any

import pydantic
from pydantic import ConfigDict

__all__ = ["FitInfo", "InnerAttack", "LayerDamage", "LayerMapInfo", "Measure", "Provenance", "Stored", "Threat"]


class Stored(pydantic.BaseModel):
    """A frozen document."""

    # Keys may be added in later versions: a reader ignores what it does not know.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Measure(Stored):
    """A figure with its 95 % interval; all null where nothing was measured, no interval where it is a mean."""

    value: float | None
    low: float | None = None
    high: float | None = None


class Threat(Stored):
    """The budget of a cell."""

    norm: str
    eps: float
    placement: str | None = None


class InnerAttack(Stored):
    """The attack whose images an encoder was hardened on; `artifact_sha256` is of what it had learned before."""

    name: str
    params: dict[str, Any]
    artifact_sha256: str = ""


class Provenance(Stored):
    """How an artefact was trained: on what, with what, for how long, to which losses.

    `forwards` and `backwards` count images sent through the encoders; `losses` are the terms at the last step; `key`
    digests everything that decides the training, its plugins' code included. `inner` tells a hardened encoder from what
    an attack learned; its name is `none` for a hardening without an attack. The digest of images that were `streamed`
    is over their files; `surrogate_unreadable` counts those left out, or replaced by their neighbours.
    """

    plugin: str
    version: str
    encoder: str
    encoder_sha256: str
    input_size: tuple[int, int]
    partners: tuple[str, ...] = ()
    partners_sha256: tuple[str, ...] = ()
    surrogate: str
    surrogate_sha256: str
    surrogate_samples: int
    threat: Threat
    defense: str = "none"
    knowledge: str = "none"
    params: dict[str, Any]
    seed: int
    steps: int
    precision: str
    device: str
    seconds: float
    forwards: int
    backwards: int
    losses: dict[str, float]
    created: str
    packages: dict[str, str]
    key: str = ""
    inner: InnerAttack | None = None
    streamed: bool = False
    surrogate_unreadable: int = 0
    processes: int = 1


class LayerDamage(Stored):
    """What attacking one layer alone did to surrogate images, as mean cosine distances in [0, 2].

    `vulnerability` is how far the tokens of all layers turned on average, `own` how far the layer's own did, `features`
    how far the pooled features; `chosen` layers are the ones that the attack goes for.
    """

    layer: str
    vulnerability: float
    own: float
    features: float
    chosen: bool


class FitInfo(Provenance):
    """The artefact a cell was attacked with; `origin` says where it came from: this run's fit, a file, or shipped.

    `downstream_images` counts the evaluated images that were among the surrogate ones; `layers` is the artefact's layer
    map, where it holds one.
    """

    sha256: str
    origin: str
    downstream_images: int = 0
    layers: tuple[LayerDamage, ...] = ()


class LayerMapInfo(Stored):
    """Which layers of an encoder are vulnerable, as one attack measured it at one budget, shallow to deep.

    Measured by the attack on unlabelled surrogate images, through the defence where it knows one.
    """

    attack: str
    threat: Threat
    defense: str
    knowledge: str
    surrogate: str
    layers: tuple[LayerDamage, ...]
