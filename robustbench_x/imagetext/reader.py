"""A model that reads images: what it can be asked about pixels, whichever family it is of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Preprocessing, check_range
from robustbench_x.errors import ConfigError, SourceError

__all__ = ["Decoding", "LoadedReader", "Reader", "Skills"]


class Reader(Protocol):
    """Images `(N, 3, H, W)` in [0, 1] to scores and words.

    `can` holds the names of the methods that work: `match`, `caption`, `answer`; the others raise SourceError.
    Resizing and normalisation happen inside, with gradients.
    """

    @property
    def source(self) -> str:
        """Where it came from, as the user wrote it."""

    @property
    def sha256(self) -> str:
        """Digest of its weights."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image file becomes its input."""

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) that it reads; other sizes are resized inside."""

    @property
    def can(self) -> frozenset[str]:
        """The methods it supports."""

    def match(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """How well each of M texts describes each image, `(N, M)`: higher is better."""

    def caption(self, images: Tensor) -> list[str]:
        """One description of each image, the same on every call."""

    def answer(self, images: Tensor, questions: Sequence[str], choices: Sequence[str]) -> Tensor:
        """Log-likelihoods `(N, C)` of each of C choices as the answer to image n's own question n."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How captions are written: beam search without sampling, after a prompt that is not part of the caption."""

    prompt: str
    num_beams: int
    min_new_tokens: int
    max_new_tokens: int


class Skills(NamedTuple):
    """What a family can do with images that are resized and normalised already; None where it cannot."""

    match: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    caption: Callable[[Tensor], list[str]] | None = None
    answer: Callable[[Tensor, Sequence[str], Sequence[str]], Tensor] | None = None


@final
class LoadedReader(nn.Module):
    """A `Reader` over a frozen model.

    Args:
        source: As the user wrote it.
        model: Holds every weight, so that it moves between devices.
        skills: Functions over `model`.
        preprocessing: Of its image processor.
        sha256: Digest of its weight files.
        notes: What a reader of a report must know.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        source: str,
        model: nn.Module,
        skills: Skills,
        preprocessing: Preprocessing,
        sha256: str,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.source = source
        self.model = model
        self.preprocessing = preprocessing
        self.sha256 = sha256
        self.notes = tuple(notes)
        self._skills = skills
        self.can = frozenset(name for name, skill in skills._asdict().items() if skill is not None)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) that it reads."""
        return self.preprocessing.input_size

    def match(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Scores `(N, M)` float32 of M texts for N images, differentiable in the pixels.

        With a matching head the log-odds that the text belongs to the image; otherwise the mean log-likelihood
        of the text's tokens as a caption, so that long texts are not behind short ones.

        Raises:
            SourceError: This model cannot match.
            RangeError: A pixel lies outside [0, 1].
        """
        if self._skills.match is None:
            raise self._unable("match")
        if not texts:
            raise ConfigError(f"{self.source}: there is no text to match")
        return self._skills.match(self.normalised(images), texts).float()

    @torch.no_grad()
    def caption(self, images: Tensor) -> list[str]:
        """One description of each image.

        Raises:
            SourceError: This model writes nothing.
            RangeError: A pixel lies outside [0, 1].
        """
        if self._skills.caption is None:
            raise self._unable("caption")
        return self._skills.caption(self.normalised(images))

    def answer(self, images: Tensor, questions: Sequence[str], choices: Sequence[str]) -> Tensor:
        """Log-likelihoods `(N, C)` float32, summed over tokens, of each choice as the answer to question n on image n.

        Raises:
            SourceError: This model takes no questions.
            ConfigError: There is not one question to each image, or no choice.
            RangeError: A pixel lies outside [0, 1].
        """
        if self._skills.answer is None:
            raise self._unable("answer")
        if len(questions) != len(images) or not choices:
            raise ConfigError(
                f"{self.source}: {len(questions)} questions and {len(choices)} choices for {len(images)} images; "
                "give one question for each image and at least one choice"
            )
        return self._skills.answer(self.normalised(images), questions, choices).float()

    def normalised(self, images: Tensor) -> Tensor:
        """What the model itself is shown: at its size, normalised.

        A batch of another size is resized as a whole, by the image processor's own rule; PIL's 8-bit rounding
        aside, that is what the processor does to a square image.
        """
        check_range(images)
        if tuple(images.shape[-2:]) != self.input_size:
            mode = "bilinear" if self.preprocessing.interpolation in ("bilinear", "nearest") else "bicubic"
            images = F.interpolate(images, self.input_size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
        return (images - self.mean) / self.std

    def _unable(self, skill: str) -> SourceError:
        able = " and ".join(sorted(self.can))
        return SourceError(f"{self.source} cannot {skill}: a {type(self.model).__name__} can {able}")
