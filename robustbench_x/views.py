"""What an attack is handed: one view per access level, and nothing else.

Access is enforced by omission. An `EncoderView` has no labels, no head and no downstream data to reach for;
a `QueryView` answers questions without holding the model. A test walks everything an attack can reach
through the attributes of its view. This keeps honest code honest and makes a slip impossible; it is no
sandbox: a plugin is code you installed, and Python lets it read the whole process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from robustbench_x.encoders.encoder import Encoder, Tokens, features_of_looks, tokens_of_looks
from robustbench_x.encoders.text import TextTower
from robustbench_x.errors import AttackError, BudgetError
from robustbench_x.randomness import SampleRandom
from robustbench_x.threat import ThreatModel
from robustbench_x.world import SINGLE, World

__all__ = [
    "Access",
    "DefenseFitView",
    "EncoderHandle",
    "EncoderView",
    "FitView",
    "ImagePool",
    "ImageView",
    "Images",
    "Knowledge",
    "Meter",
    "ModelHandle",
    "Query",
    "QueryView",
    "View",
    "WhiteboxView",
]

Access = Literal["none", "encoder", "whitebox", "scores", "labels"]
Knowledge = Literal["none", "oblivious", "bpda", "bpda_learned", "full"]
"""What an attacker has of a defence; see `robustbench_x.victim.perceive`."""
Perceive = Callable[[Tensor], Tensor]
Watch = Callable[[Tensor, Tensor], None]


@final
class Meter:
    """Counts images sent forward and backward through the victim; the harness reads it, the attack cannot reset it."""

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0

    def count(self, output: Tensor, batch: int) -> Tensor:
        """Counts one forward of `batch` images, and a backward each time a gradient arrives at `output`."""
        self.forwards += batch
        if output.requires_grad:
            output.register_hook(lambda gradient: self._count_backward(batch))  # type: ignore[no-untyped-call]
        return output

    def count_any(self, outputs: Sequence[Tensor], batch: int) -> None:
        """Counts one forward of `batch` images, and a backward each time one gives a gradient to any of `outputs`."""
        self.forwards += batch
        carrying = [output for output in outputs if output.requires_grad]
        if carrying:
            register_multi_grad_hook(carrying, lambda gradient: self._count_backward(batch), mode="any")

    def _count_backward(self, batch: int) -> None:
        self.backwards += batch


@final
class EncoderHandle:
    """The encoder as an attack sees it: through whatever it knows of the defence, metered, with gradients.

    Args:
        encoder: The public encoder.
        perceive: Pixels to pixels: the defence as the attacker knows it (identity when undefended).
        meter: Counts passes.
        bf16: Runs the network under bfloat16 autocast; outputs are float32 all the same.
        stochastic: Whether `perceive` draws anew at every call, so that gradients deserve averaging.
        text: The encoder's text side, where it has one: as public as the rest of it.
    """

    def __init__(
        self,
        encoder: Encoder,
        perceive: Perceive,
        meter: Meter,
        *,
        bf16: bool = False,
        stochastic: bool = False,
        text: TextTower | None = None,
    ) -> None:
        self._encoder = encoder
        self._text = text
        self._perceive = perceive
        self._meter = meter
        self._bf16 = bf16
        self.stochastic = stochastic

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names for `tokens`, shallow to deep."""
        return self._encoder.layers

    @property
    def parts(self) -> tuple[str, ...]:
        """Further names for `tokens`: the attention and the MLP inside a layer, as `LAYER.attn` and `LAYER.mlp`."""
        return self._encoder.parts

    @property
    def feature_dim(self) -> int:
        """Width D of the pooled features."""
        return self._encoder.feature_dim

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) the encoder runs at."""
        return self._encoder.input_size

    @property
    def sha256(self) -> str:
        """Digest of the encoder's weights, for caches and artefacts."""
        return self._encoder.sha256

    def features(self, images: Tensor) -> Tensor:
        """Pooled features `(N, D)` float32 of `images` `(N, 3, H, W)` in [0, 1]."""
        with _autocast(images, self._bf16):
            features = features_of_looks(self._encoder, self._perceive(images)).float()
        return self._meter.count(features, len(images))

    @property
    def reads_text(self) -> bool:
        """Whether `texts` works."""
        return self._text is not None

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `(M, D)` of `texts` in the space of `features`, L2-normalised; costs no pass.

        Raises:
            AttackError: The encoder reads no text.
        """
        if self._text is None:
            raise AttackError(f"the encoder {self._encoder.source} reads no text; choose an image-text encoder")
        return self._text(texts)  # type: ignore[no-any-return]

    def tokens(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tokens]:
        """Tokens of the named layers (see `Encoder.tokens`); the meter counts one pass, shallow or not."""
        with _autocast(images, self._bf16):
            tokens = tokens_of_looks(self._encoder, self._perceive(images), layers)
        self._meter.count_any([t for found in tokens.values() for t in found if t is not None], len(images))
        return tokens


@final
class ModelHandle:
    """The whole victim as an attack with white-box access sees it: `model(images)` gives logits with gradients.

    Args:
        logits: Pixels to logits `(N, K)`.
        meter: Counts passes.
        bf16: Runs the victim under bfloat16 autocast; logits are float32 all the same.
        stochastic: Whether the victim draws anew at every call.
        watch: Told every question and its answer, on the harness's behalf.
    """

    def __init__(
        self,
        logits: Perceive,
        meter: Meter,
        *,
        bf16: bool = False,
        stochastic: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self._logits = logits
        self._meter = meter
        self._bf16 = bf16
        self.stochastic = stochastic
        self._watch = watch

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `(N, K)` float32 of `images` `(N, 3, H, W)` in [0, 1]."""
        with _autocast(images, self._bf16):
            logits = self._logits(images).float()
        if self._watch is not None:
            self._watch(images, logits)
        return self._meter.count(logits, len(images))


_ORACLES: dict[int, Perceive] = {}
"""Victims behind open queries, by ticket; a `Query` holds the ticket only."""


@final
class Query:
    """Answers about the victim, counted and capped; holds no reference to it.

    Args:
        logits: Pixels to logits; kept out of reach of this object's attributes.
        meter: Counts images asked about.
        answer: `scores` returns logits, `labels` the predicted classes.
        cap: Most images that may be asked about in this batch; None for no cap.
        stochastic: Whether the victim draws anew at every call; asking twice would tell.
        watch: As for `ModelHandle`.
    """

    def __init__(
        self,
        logits: Perceive,
        meter: Meter,
        *,
        answer: Literal["scores", "labels"],
        cap: int | None,
        stochastic: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.stochastic = stochastic
        self._ticket = id(self)
        self._watch = watch
        _ORACLES[self._ticket] = logits
        self._meter = meter
        self._answer = answer
        self._cap = cap

    @property
    def remaining(self) -> int | None:
        """Images that may still be asked about; None without a cap."""
        return None if self._cap is None else self._cap - self._meter.forwards

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits `(N, K)` or predicted classes `(N,)`, never with a gradient.

        Raises:
            BudgetError: The cap would be exceeded.
        """
        if self._cap is not None and self._meter.forwards + len(images) > self._cap:
            raise BudgetError(f"the query cap of {self._cap} images is spent ({self._meter.forwards} used)")
        logits = self._meter.count(_ORACLES[self._ticket](images).float(), len(images))
        if self._watch is not None:
            self._watch(images, logits)
        return logits.detach().clone() if self._answer == "scores" else logits.argmax(dim=1)

    def close(self) -> None:
        """Ends the session; later questions fail."""
        _ORACLES.pop(self._ticket, None)


@dataclass(frozen=True, kw_only=True)
class View:
    """What every attack is handed.

    `inputs` are clean images `(N, 3, H, W)` in [0, 1] (a copy: writing to it changes nothing), `threat` the
    budget, `random` the only randomness to use. `exhaustive` asks for the strongest images the attack can
    make; without it an attack may stop working on a sample that is already fooled.
    """

    inputs: Tensor
    threat: ThreatModel
    random: SampleRandom
    exhaustive: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageView(View):
    """Access `none`: images only."""


@dataclass(frozen=True, kw_only=True)
class EncoderView(View):
    """Access `encoder`: the public encoder and unlabelled surrogate images; no head, no labels, no downstream data.

    `surrogate` is `(M, 3, H, W)` in [0, 1], or None when the audit names no surrogate data. `artifact` holds what an
    attack that is trained first learned, and is None for every other attack and where the budget is zero. `partners`
    are the further public encoders that it asked for; they take images of the victim's size.

    `targets` `(N, 3, H, W)` in [0, 1] are there for an attack that aims: the image, one per sample and without its
    label, that the victim should take the sample for. `target_texts` says what they show where the data has captions.
    """

    encoder: EncoderHandle
    surrogate: Tensor | None = None
    artifact: Mapping[str, Tensor] | None = None
    partners: tuple[EncoderHandle, ...] = ()
    targets: Tensor | None = None
    target_texts: tuple[str, ...] | None = None


class Images(Protocol):
    """Unlabelled images of one size, held in memory or read from their files when asked for."""

    def __len__(self) -> int:
        """How many there are."""

    def batch(self, index: Tensor) -> Tensor:
        """Pixels `(len(index), 3, H, W)` float32 in [0, 1] of the images at `index`."""

    def expect(self, index: Tensor) -> None:
        """Says that `batch` will soon be asked for these, so that reading them can begin; changes no answer."""


@final
class ImagePool:
    """Unlabelled images, kept as bytes and handed out as pixels.

    Args:
        levels: `(M, 3, H, W)` uint8, on the CPU.
        device: Where batches are returned.
    """

    def __init__(self, levels: Tensor, *, device: torch.device | str = "cpu") -> None:
        self._levels = levels
        self._device = torch.device(device)

    def __len__(self) -> int:
        return len(self._levels)

    def batch(self, index: Tensor) -> Tensor:
        """Pixels `(len(index), 3, H, W)` float32 in [0, 1] of the images at `index`."""
        return self._levels[index.cpu()].to(self._device, non_blocking=True).float().div(255)

    def expect(self, index: Tensor) -> None:
        """Nothing to do: they are in memory."""


@dataclass(frozen=True, kw_only=True)
class FitView:
    """What a training is handed, at access `encoder`: public encoders and unlabelled images, nothing downstream.

    `encoder` is the one it is fitted on, through the defence as far as the attacker knows it; `partners` are the
    further public encoders it asked for; `surrogate` holds images of the encoder's input size; all randomness
    follows from `seed`. `world` has the processes that share the training: all take the same steps with the same index,
    and an attack that `scales` takes the rows that are its own. `bf16` asks for bfloat16 autocast, which the encoders
    have already.
    """

    encoder: EncoderHandle
    surrogate: Images
    threat: ThreatModel
    seed: int
    device: torch.device
    partners: tuple[EncoderHandle, ...] = ()
    world: World = SINGLE
    bf16: bool = False


@dataclass(frozen=True, kw_only=True)
class DefenseFitView:
    """What the training of a defence is handed: the defender's own clean images, without labels, and no attack.

    `images` are patches of the side it asked for, or images of the encoder's input size; `held_out` are others, never
    trained on, of other files where there are several. `encoder` is there only for a defence that is fitted for one.
    """

    images: ImagePool
    held_out: ImagePool
    seed: int
    device: torch.device
    encoder: EncoderHandle | None = None


@dataclass(frozen=True, kw_only=True)
class WhiteboxView(View):
    """Access `whitebox`: the victim's logits with gradients, and the true `labels` `(N,)` as logit indices.

    `detector` is there for an attack that evades detectors: pixels to how clearly each image is accepted, `(N,)` with
    gradients, in spreads of the clean scores; below 0 it is refused, and a refused image fools nobody.
    """

    labels: Tensor
    model: ModelHandle
    num_classes: int
    detector: Perceive | None = None


@dataclass(frozen=True, kw_only=True)
class QueryView(View):
    """Access `scores` or `labels`: a counted query function, and the true `labels` `(N,)`."""

    labels: Tensor
    query: Query
    num_classes: int


def _autocast(images: Tensor, bf16: bool) -> torch.autocast:
    return torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16)
