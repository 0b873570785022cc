"""The language model behind an image reader: likelihoods of texts, and captions, after embedded contexts."""

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.errors import SourceError
from robustbench_x.imagetext.reader import Decoding

__all__ = ["Language", "Prompted", "generation_config"]

_ROWS = 32  # sequences in one pass


class Prompted(NamedTuple):
    """Tokens around the image, and the tokens to score after them."""

    before: list[int]
    after: list[int]
    target: list[int]


@final
class Language:
    """A causal or an encoder-decoder language model that takes images as embeddings among its tokens.

    Args:
        source: Opens every error message.
        model: Called with `inputs_embeds`, and for its `generate`.
        tokenizer: Its own.
        image_token: Marks the image's place in a tokenised prompt; None puts the image first.
        eos: Tokens that end a caption.
    """

    def __init__(self, source: str, model: Any, tokenizer: Any, *, image_token: int | None, eos: Sequence[int]) -> None:
        self.source = source
        self.model = model
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.eos = list(eos)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)

    def prompted(self, prompt: str, text: str) -> Prompted:
        """How `text` continues `prompt`: a causal model reads both in one go, as it was trained."""
        context = self._ids(prompt)
        if self.encoder_decoder:
            return Prompted(*self._around(context), self._ids(text))
        joint = self._ids(f"{prompt} {text}" if prompt else text)
        shared = next((i for i, pair in enumerate(zip(context, joint, strict=False)) if pair[0] != pair[1]), None)
        shared = min(len(context), len(joint)) if shared is None else shared
        if shared == len(joint):
            raise SourceError(f"{self.source}: '{text}' has no tokens to score")
        return Prompted(*self._around(joint[:shared]), joint[shared:])

    def log_likelihoods(self, images: Tensor, rows: Sequence[Prompted], owners: Sequence[int]) -> Tensor:
        """Log-likelihoods `(R,)` of each row's target, summed over its tokens.

        Args:
            images: Embeddings `(N, Q, D)` of the images.
            rows: The tokens of R sequences.
            owners: Whose image each row is about.
        """
        found = [
            self._scored(images, rows[start : start + _ROWS], owners[start : start + _ROWS])
            for start in range(0, len(rows), _ROWS)
        ]
        return torch.cat(found)

    def write(self, images: Tensor, decoding: Decoding) -> list[str]:
        """A caption for each image after the same prompt."""
        before, after = self._around(self._ids(decoding.prompt))
        contexts = self._contexts(images, [Prompted(before, after, [])] * len(images), range(len(images)))
        embeds = torch.stack(contexts)
        tokens = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            generation_config=generation_config(
                decoding,
                eos=self.eos,
                pad=self._pad,
                bos=self.tokenizer.bos_token_id,
                start=getattr(self.model.config, "decoder_start_token_id", None),
            ),
        )
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eos[0] if pad is None else int(pad)

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        # A causal model must not see its end before the answer; OPT opens with the very same token.
        if not self.encoder_decoder and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids

    def _around(self, ids: list[int]) -> tuple[list[int], list[int]]:
        if self.image_token is None:
            return [], ids
        if ids.count(self.image_token) != 1:
            raise SourceError(f"{self.source}: its tokenizer does not turn <image> into token {self.image_token}")
        place = ids.index(self.image_token)
        return ids[:place], ids[place + 1 :]

    def _embed(self, ids: Sequence[int], like: Tensor) -> Tensor:
        found: Tensor = self.model.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.long, device=like.device))
        return found.to(like.dtype)

    def _contexts(self, images: Tensor, rows: Sequence[Prompted], owners: Sequence[int]) -> list[Tensor]:
        return [
            torch.cat([self._embed(row.before, images), images[owner], self._embed(row.after, images)])
            for row, owner in zip(rows, owners, strict=True)
        ]

    def _scored(self, images: Tensor, rows: Sequence[Prompted], owners: Sequence[int]) -> Tensor:
        contexts = self._contexts(images, rows, owners)
        if self.encoder_decoder:
            embeds, mask = _padded(contexts)
            labels = torch.full((len(rows), max(len(row.target) for row in rows)), -100, device=images.device)
            for line, row in zip(labels, rows, strict=True):
                line[: len(row.target)] = torch.tensor(row.target)
            logits = self.model(inputs_embeds=embeds, attention_mask=mask, labels=labels).logits
            starts = [0] * len(rows)
        else:
            sequences = [
                torch.cat([context, self._embed(row.target, context)])
                for context, row in zip(contexts, rows, strict=True)
            ]
            embeds, mask = _padded(sequences)
            logits = self.model(inputs_embeds=embeds, attention_mask=mask).logits
            starts = [len(context) - 1 for context in contexts]  # the last context token predicts the first target
        return torch.stack(
            [
                _sum_log_likelihood(line[start : start + len(row.target)], row.target)
                for line, start, row in zip(logits, starts, rows, strict=True)
            ]
        )


def generation_config(
    decoding: Decoding, *, eos: Sequence[int], pad: int, bos: int | None = None, start: int | None = None
) -> Any:
    """Deterministic generation, free of what the hub's files would add (sampling, temperatures)."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams,
        min_new_tokens=decoding.min_new_tokens,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(eos),
        pad_token_id=pad,
        bos_token_id=bos,
        decoder_start_token_id=start,
    )


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    embeds = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=embeds.device)
    return embeds, mask


def _sum_log_likelihood(logits: Tensor, target: Sequence[int]) -> Tensor:
    picked = logits.float().log_softmax(dim=1).gather(1, torch.tensor([[i] for i in target], device=logits.device))
    return picked.sum()
