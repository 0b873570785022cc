"""Readers that talk: BLIP-2, InstructBLIP and LLaVA."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustbench_x.imagetext.language import Language
from robustbench_x.imagetext.reader import Decoding, Skills

__all__ = ["blip2", "instructblip", "llava"]

# Normalised pixels and one prompt for each image, to the embeddings (N, Q, D) that the language model reads.
_See = Callable[[Tensor, Sequence[str]], Tensor]


def blip2(source: str, model: Any, tokenizer: Any, decoding: Decoding) -> Skills:
    """BLIP-2: a Q-Former's queries ahead of an OPT or T5 prompt; questions as `Question: ... Answer:`."""

    def see(pixels: Tensor, _prompts: Sequence[str]) -> Tensor:
        states = model.vision_model(pixels).last_hidden_state
        found = model.qformer(
            query_embeds=model.query_tokens.expand(len(pixels), -1, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=_ones(states),
        ).last_hidden_state
        return _projected(model, found)

    language = Language(source, model.language_model, tokenizer, image_token=None, eos=_ends(model, tokenizer))
    # Its captions were learnt without a prompt; `decoding.prompt` is how its authors have it write.
    return _skills(language, see, decoding, ask="Question: {} Answer:", describe="")


def instructblip(source: str, model: Any, tokenizer: Any, qformer_tokenizer: Any, decoding: Decoding) -> Skills:
    """InstructBLIP: the Q-Former reads the prompt too; questions are asked as they stand."""

    def see(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        states = model.vision_model(pixels).last_hidden_state
        queries = model.query_tokens.expand(len(pixels), -1, -1)
        text = qformer_tokenizer(list(prompts), padding=True, truncation=True, max_length=512, return_tensors="pt")
        ids, mask = text["input_ids"].to(pixels.device), text["attention_mask"].to(pixels.device)
        found = model.qformer(
            input_ids=ids,
            attention_mask=torch.cat([_ones(queries), mask], dim=1),
            query_embeds=queries,
            encoder_hidden_states=states,
            encoder_attention_mask=_ones(states),
        ).last_hidden_state
        return _projected(model, found[:, : queries.shape[1]])

    language = Language(source, model.language_model, tokenizer, image_token=None, eos=_ends(model, tokenizer))
    return _skills(language, see, decoding, ask="{}", describe=decoding.prompt)


def llava(source: str, model: Any, tokenizer: Any, decoding: Decoding) -> Skills:
    """LLaVA-1.5: patch embeddings where its conversation template has `<image>`."""

    def see(pixels: Tensor, _prompts: Sequence[str]) -> Tensor:
        found = model.get_image_features(pixel_values=pixels)
        found = getattr(found, "pooler_output", found)  # an object from transformers 5 on
        return found if isinstance(found, Tensor) else torch.stack(list(found))

    image_token = int(model.config.image_token_index)
    mark = tokenizer.convert_ids_to_tokens(image_token)
    chat = f"USER: {mark}\n{{}} ASSISTANT:"
    language = Language(source, model, tokenizer, image_token=image_token, eos=_ends(model, tokenizer))
    prompt = chat.format(decoding.prompt)
    written = Decoding(
        prompt=prompt,
        num_beams=decoding.num_beams,
        min_new_tokens=decoding.min_new_tokens,
        max_new_tokens=decoding.max_new_tokens,
    )
    return _skills(language, see, written, ask=chat, describe=prompt)


def _skills(language: Language, see: _See, decoding: Decoding, *, ask: str, describe: str) -> Skills:
    """The three skills of a language model that sees; `ask` wraps a question, `describe` precedes a matched text."""

    def match(pixels: Tensor, texts: Sequence[str]) -> Tensor:
        images = see(pixels, [describe] * len(pixels))
        rows = [language.prompted(describe, text) for text in texts]
        lengths = torch.tensor([len(row.target) for row in rows], device=pixels.device)
        owners = [n for n in range(len(pixels)) for _ in rows]
        return language.log_likelihoods(images, rows * len(pixels), owners).view(len(pixels), -1) / lengths

    def caption(pixels: Tensor) -> list[str]:
        return language.write(see(pixels, [decoding.prompt] * len(pixels)), decoding)

    def answer(pixels: Tensor, questions: Sequence[str], choices: Sequence[str]) -> Tensor:
        prompts = [ask.format(question) for question in questions]
        images = see(pixels, prompts)
        rows = [language.prompted(prompt, choice) for prompt in prompts for choice in choices]
        owners = [n for n in range(len(prompts)) for _ in choices]
        return language.log_likelihoods(images, rows, owners).view(len(prompts), len(choices))

    return Skills(match=match, caption=caption, answer=answer)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Every token that one of the published files calls an end; OPT's BLIP-2 ends captions with a line break."""
    found: set[int] = set()
    for ids in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.text_config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found |= set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {int(ids)}
    return sorted(found)


def _ones(states: Tensor) -> Tensor:
    return torch.ones(states.shape[:2], dtype=torch.long, device=states.device)


def _projected(model: Any, queries: Tensor) -> Tensor:
    found: Tensor = model.language_projection(queries.to(model.language_projection.weight.dtype))
    return found
