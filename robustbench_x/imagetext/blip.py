"""BLIP and BLIP-2 readers that match texts, and BLIP's captioner."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustbench_x.imagetext.language import generation_config
from robustbench_x.imagetext.reader import Decoding, Skills

__all__ = ["blip2_matching", "blip_captioning", "blip_matching"]

_PAIRS = 64  # image-text pairs in one pass


def blip_matching(model: Any, tokenizer: Any) -> Skills:
    """BLIP's image-text matching head: log-odds of "match"."""

    def match(pixels: Tensor, texts: Sequence[str]) -> Tensor:
        states = model.vision_model(pixels).last_hidden_state
        ids, mask = _tokens(tokenizer, texts, model.config.text_config.max_position_embeddings, pixels)

        def pairs(i: Tensor, j: Tensor) -> Tensor:
            found = model.text_encoder(
                input_ids=ids[j],
                attention_mask=mask[j],
                encoder_hidden_states=states[i],
                encoder_attention_mask=_ones(states[i]),
            ).last_hidden_state
            return _log_odds(model.itm_head(found[:, 0]))

        return _over_pairs(pairs, len(pixels), len(texts), pixels)

    return Skills(match=match)


def blip2_matching(model: Any, tokenizer: Any) -> Skills:
    """BLIP-2's matching head over its query tokens: log-odds of "match"."""

    def match(pixels: Tensor, texts: Sequence[str]) -> Tensor:
        states = model.vision_model(pixels).last_hidden_state
        ids, mask = _tokens(tokenizer, texts, model.config.qformer_config.max_position_embeddings, pixels)

        def pairs(i: Tensor, j: Tensor) -> Tensor:
            queries = model.query_tokens.expand(len(i), -1, -1)
            found = model.qformer(
                query_embeds=model.embeddings(input_ids=ids[j], query_embeds=queries),
                query_length=queries.shape[1],
                attention_mask=torch.cat([_ones(queries), mask[j]], dim=1),
                encoder_hidden_states=states[i],
                encoder_attention_mask=_ones(states[i]),
            ).last_hidden_state
            return _log_odds(model.itm_head(found[:, : queries.shape[1]]).mean(dim=1))

        return _over_pairs(pairs, len(pixels), len(texts), pixels)

    return Skills(match=match)


def blip_captioning(model: Any, tokenizer: Any, decoding: Decoding) -> Skills:
    """BLIP's text decoder: writes captions, and matches by the mean log-likelihood of a text's tokens."""
    text = model.config.text_config

    def match(pixels: Tensor, texts: Sequence[str]) -> Tensor:
        states = model.vision_model(pixels).last_hidden_state
        ids, mask = _tokens(tokenizer, texts, text.max_position_embeddings, pixels)
        ids[:, 0] = text.bos_token_id  # BLIP's decoder opens with a token of its own

        def pairs(i: Tensor, j: Tensor) -> Tensor:
            logits = model.text_decoder(
                input_ids=ids[j],
                attention_mask=mask[j],
                encoder_hidden_states=states[i],
                encoder_attention_mask=_ones(states[i]),
            ).logits
            picked = logits[:, :-1].log_softmax(dim=2).gather(2, ids[j][:, 1:, None]).squeeze(2)
            weights = mask[j][:, 1:].to(picked.dtype)
            mean: Tensor = (picked * weights).sum(dim=1) / weights.sum(dim=1)
            return mean

        return _over_pairs(pairs, len(pixels), len(texts), pixels)

    def caption(pixels: Tensor) -> list[str]:
        states = model.vision_model(pixels).last_hidden_state
        prompt = tokenizer(decoding.prompt)["input_ids"][:-1]
        start = torch.tensor([[text.bos_token_id, *prompt[1:]]], device=pixels.device).expand(len(pixels), -1)
        tokens = model.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=states,
            encoder_attention_mask=_ones(states),
            generation_config=generation_config(decoding, eos=[text.sep_token_id], pad=text.pad_token_id),
        )
        written = tokens[:, start.shape[1] :]
        return [line.strip() for line in tokenizer.batch_decode(written, skip_special_tokens=True)]

    return Skills(match=match, caption=caption)


def _tokens(tokenizer: Any, texts: Sequence[str], limit: int, like: Tensor) -> tuple[Tensor, Tensor]:
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=int(limit), return_tensors="pt")
    return found["input_ids"].to(like.device), found["attention_mask"].to(like.device)


def _ones(states: Tensor) -> Tensor:
    return torch.ones(states.shape[:2], dtype=torch.long, device=states.device)


def _log_odds(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def _over_pairs(score: Callable[[Tensor, Tensor], Tensor], images: int, texts: int, like: Tensor) -> Tensor:
    """`score` of every image with every text, `(images, texts)`, some pairs at a time."""
    i = torch.arange(images, device=like.device).repeat_interleave(texts)
    j = torch.arange(texts, device=like.device).repeat(images)
    found = [score(a, b) for a, b in zip(torch.split(i, _PAIRS), torch.split(j, _PAIRS), strict=True)]
    return torch.cat(found).view(images, texts)
