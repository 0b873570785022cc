"""Heads that are whole vision-language models: they look at the pixels themselves, and speak of them.

`match:SOURCE` ranks captions by how well they match the image, `entail:SOURCE` is asked of every caption whether it is
true of the image, `caption:SOURCE` describes the image in its own words. The encoder of the audit is then what the
attacker has: the surrogate on which a transfer attack is made. An image is right when the best caption is its own.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from robustbench_x.data.dataset import Item
from robustbench_x.encoders.encoder import Encoder, LoadedEncoder, Preprocessing, Tokens
from robustbench_x.errors import ConfigError, SourceError
from robustbench_x.heads.base import FittedHead, HeadSpec, Task
from robustbench_x.heads.text import groups_of
from robustbench_x.imagetext.captions import rouge_l
from robustbench_x.imagetext.reader import Reader

__all__ = ["QUESTION", "READERS", "ReaderHead", "build_reader_head"]

QUESTION = 'Is it true of this image that "{}"? Answer yes, no or maybe.'
"""Of SNLI-VE's three labels; the wording is ours, as the paper's is not published."""

_CHOICES = ("yes", "no", "maybe")
_MOST_QUESTIONS = 200
_REMEMBERED = 4096


@final
class _Pixels(nn.Module):
    """The pixels as features: what a whole model is handed."""

    layers: tuple[str, ...] = ()
    is_pixels = True

    def pooled(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        return []


@final
class ReaderHead(nn.Module):
    """Pixels `(N, 3 * H * W)` in [0, 1] to the best score of each group of captions, `(N, G)`.

    Args:
        reader: The model.
        size: (height, width) of the images.
        texts: Every caption, group by group.
        group: `(M,)`, the group of each.
        skill: `match`, `entail` or `caption`.
    """

    group: Tensor

    def __init__(self, reader: Reader, size: tuple[int, int], texts: Sequence[str], group: Tensor, skill: str) -> None:
        super().__init__()
        self.reader = reader
        self.register_buffer("group", group)
        self._size = size
        self._texts = tuple(texts)
        self._skill = skill
        self._groups = int(group.max()) + 1
        self._said: dict[bytes, str] = {}

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(N, G)`; only those of `match` and `entail` have a gradient."""
        scores = self.scores(features)
        best = scores.new_full((len(scores), self._groups), -torch.inf)
        return best.scatter_reduce(1, self.group.expand_as(scores), scores, reduce="amax")

    def scores(self, features: Tensor) -> Tensor:
        """Scores `(N, M)` of every caption.

        `match`: the model's own. `entail`: log-likelihood of yes less that of no or maybe, so above 0 it says yes.
        `caption`: ROUGE-L of what the model says against each caption. An image with NaN in it, which a defence made,
        has NaN scores, and the model does not see it.
        """
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            scores = torch.full((len(features), len(self._texts)), torch.nan, device=features.device)
            return scores.index_put((finite,), self.scores(features[finite])) if finite.any() else scores
        if self._skill == "match":
            return self.reader.match(self._images(features), self._texts)
        if self._skill == "entail":
            return torch.stack([self._entailed(self._images(features), text) for text in self._texts], dim=1)
        said = self.say(features)
        rows = [_rouge(text, self._texts) for text in said]
        return torch.tensor(rows, device=features.device)

    def say(self, features: Tensor) -> list[str]:
        """What the model says of each image; only for `caption`.

        The same image is described once: a judge asks for the scores and for the words.
        """
        broken = ~features.isfinite().all(dim=1)
        if broken.any():
            said = iter(self.say(features[~broken]) if not broken.all() else [])
            return ["" if lost else next(said) for lost in broken.tolist()]
        keys = [hashlib.sha256(row.numpy().tobytes()).digest() for row in features.detach().cpu()]
        new = [i for i, key in enumerate(keys) if key not in self._said]
        if new:
            if len(self._said) > _REMEMBERED:
                self._said = {key: self._said[key] for key in keys if key in self._said}
            texts = self.reader.caption(self._images(features[new]))
            self._said |= {keys[i]: text for i, text in zip(new, texts, strict=True)}
        return [self._said[key] for key in keys]

    def _entailed(self, images: Tensor, text: str) -> Tensor:
        questions = [QUESTION.format(text)] * len(images)
        answers = self.reader.answer(images, questions, _CHOICES)
        return answers[:, 0] - answers[:, 1:].logsumexp(dim=1)

    def _images(self, features: Tensor) -> Tensor:
        return features.view(len(features), 3, *self._size)


def build_reader_head(
    name: str, *, loaded: LoadedEncoder, gallery: Sequence[Item], load: Callable[[str], Reader]
) -> FittedHead:
    """The head `KIND:SOURCE`; it reads pixels, at the size of the audit's encoder, and resizes them itself.

    Raises:
        ConfigError: There are too many captions to ask about each.
        SourceError: The model cannot do what is asked.
        DataError: An image has no caption.
    """
    kind, _, source = name.partition(":")
    texts, group, aliases = groups_of(gallery, name)
    if kind == "entail" and len(texts) > _MOST_QUESTIONS:
        raise ConfigError(
            f"head {name}: every image is asked about each of {len(texts)} captions; draw fewer with --samples, at "
            f"most {_MOST_QUESTIONS} captions"
        )
    reader = load(source)
    skill = {"entail": "answer"}.get(kind, kind)
    if skill not in reader.can:
        raise SourceError(f"head {name}: {source} cannot {skill}; it can {' and '.join(sorted(reader.can))}")
    size = loaded.encoder.input_size
    layer = ReaderHead(reader, size, texts, group, kind)
    pixels = Encoder(
        source=source, backbone=_Pixels(), preprocessing=Preprocessing(input_size=size), sha256=reader.sha256
    )
    settings: dict[str, Any] = {"reader": source, "reader_sha256": reader.sha256, "texts": len(texts)}
    return FittedHead(
        name=name,
        layer=layer,
        num_classes=int(group.max()) + 1,
        aliases=aliases,
        settings=settings | {"reads_pixels": True, "input_size": list(reader.input_size)},
        task=_TASKS[kind],
        encoder=pixels,
    )


def _rouge(said: str, texts: Sequence[str]) -> list[float]:
    scores = rouge_l([said] * len(texts), [[text] for text in texts]).samples
    return [float(score) for score in scores]


_TASKS: dict[str, Task] = {"match": "image_text", "entail": "entailment", "caption": "captioning"}
READERS = (
    HeadSpec(
        name="match",
        summary="match:SOURCE: a vision-language model ranks the captions (BLIP ITM, or by likelihood)",
        task="image_text",
    ),
    HeadSpec(
        name="entail",
        summary="entail:SOURCE: a vision-language model is asked whether each caption is true (yes, no, maybe)",
        task="entailment",
    ),
    HeadSpec(
        name="caption",
        summary="caption:SOURCE: a vision-language model describes the image; BLEU, ROUGE-L, CIDEr",
        task="captioning",
    ),
)
