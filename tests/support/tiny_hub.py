"""Tiny random models of transformers, saved in the hub's layout with a word-level tokenizer."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_QFORMER = {
    **_TEXT,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "encoder_hidden_size": 32,
    "cross_attention_frequency": 1,
}
_LLAMA = {**_TEXT, "model_type": "llama", "vocab_size": 120, "num_key_value_heads": 4, "max_position_embeddings": 128}
_OPT = {
    "model_type": "opt",
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 37,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_T5 = {
    "model_type": "t5",
    "vocab_size": 120,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_VOCABULARY = """
    a photo of the dog cat bird ship tree house yes no maybe is it there Question : Answer USER ASSISTANT ? . ,
    Describe this image in one short sentence only caption A red small on picture
"""


def _clip() -> Any:
    import transformers as t

    text = {**_TEXT, "vocab_size": 99, "max_position_embeddings": 20, "projection_dim": 24}
    text |= {"bos_token_id": 0, "eos_token_id": 98, "pad_token_id": 1}
    return t.CLIPModel(
        t.CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 24}, projection_dim=24)
    )


def _siglip() -> Any:
    import transformers as t

    text = {**_TEXT, "vocab_size": 99, "max_position_embeddings": 16, "projection_size": 32}
    text |= {"bos_token_id": 0, "eos_token_id": 98, "pad_token_id": 1}
    return t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=VISION))


def _blip_config() -> Any:
    import transformers as t

    text = {**_TEXT, "vocab_size": 99, "max_position_embeddings": 40, "projection_dim": 24}
    text |= {"bos_token_id": 95, "pad_token_id": 1, "eos_token_id": 98, "sep_token_id": 98}
    return t.BlipConfig(text_config=text, vision_config=VISION, projection_dim=24, image_text_hidden_size=16)


def _blip_itm() -> Any:
    import transformers as t

    return t.BlipForImageTextRetrieval(_blip_config())


def _blip_caption() -> Any:
    import transformers as t

    return t.BlipForConditionalGeneration(_blip_config())


def _blip2(text: dict[str, Any]) -> Any:
    import transformers as t

    return t.Blip2ForConditionalGeneration(
        t.Blip2Config(
            vision_config=VISION,
            qformer_config=_QFORMER,
            text_config=text,
            num_query_tokens=4,
            image_token_index=119,
        )
    )


def _blip2_itm() -> Any:
    import transformers as t

    return t.Blip2ForImageTextRetrieval(
        t.Blip2Config(
            vision_config=VISION,
            qformer_config={**_QFORMER, "use_qformer_text_input": True},
            text_config=_OPT,
            num_query_tokens=4,
            image_text_hidden_size=16,
        )
    )


def _instructblip(text: dict[str, Any]) -> Any:
    import transformers as t

    return t.InstructBlipForConditionalGeneration(
        t.InstructBlipConfig(
            vision_config=VISION,
            qformer_config=_QFORMER,
            text_config=text,
            num_query_tokens=4,
            image_token_index=119,
        )
    )


def _llava() -> Any:
    import transformers as t

    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config={**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 24},
            text_config=_LLAMA,
            image_token_index=119,
            image_seq_length=16,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )


MODELS: dict[str, Callable[[], Any]] = {
    "clip": _clip,
    "siglip": _siglip,
    "blip_itm": _blip_itm,
    "blip_caption": _blip_caption,
    "blip2_opt": lambda: _blip2(_OPT),
    "blip2_t5": lambda: _blip2(_T5),
    "blip2_itm": _blip2_itm,
    "instructblip_llama": lambda: _instructblip(_LLAMA),
    "instructblip_t5": lambda: _instructblip(_T5),
    "llava": _llava,
}


def save_tiny(kind: str, folder: Path) -> Path:
    """Saves the model `kind`, its image processor and its tokenizer in `folder`, which it returns."""
    import transformers as t

    t.logging.set_verbosity_error()
    t.logging.disable_progress_bar()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[kind]()
        _shake(model)
        model.save_pretrained(folder)
        if kind in ("clip", "llava"):
            processor = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        else:
            processor = t.BlipImageProcessor(size={"height": 32, "width": 32})
        processor.save_pretrained(folder)
        tokenizer(kind=kind).save_pretrained(folder)
        if kind.startswith("instructblip"):
            tokenizer(kind="qformer").save_pretrained(folder / "qformer_tokenizer")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return folder


def _shake(model: torch.nn.Module) -> None:
    """Weights large enough for outputs to differ visibly: as initialised, a tiny model answers almost constantly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
            elif name == "query_tokens":
                parameter.normal_(std=0.5)


def tokenizer(*, kind: str) -> Any:
    """A word-level tokenizer whose special tokens are those of the tiny configuration `kind`."""
    import tokenizers
    import transformers as t
    from tokenizers.processors import TemplateProcessing

    if kind.endswith("t5"):
        special = {"<pad>": 0, "</s>": 1, "<unk>": 3}
        template, names = "$A </s>", {"pad_token": "<pad>", "eos_token": "</s>"}
    elif kind == "blip2_opt":
        special = {"<pad>": 1, "</s>": 2, "<unk>": 3}
        template, names = "</s> $A", {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "</s>"}
    elif kind in ("llava", "instructblip_llama"):
        special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<image>": 119}
        template, names = "<s> $A", {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    else:
        special = {"<s>": 0, "<pad>": 1, "<unk>": 3, "</s>": 98}
        template, names = "<s> $A </s>", {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    vocabulary = special | {word: 10 + i for i, word in enumerate(_VOCABULARY.split())}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = TemplateProcessing(
        single=template, special_tokens=[(name, i) for name, i in special.items() if name in template]
    )
    made.add_special_tokens([name for name in special if name != "<unk>"])
    return t.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **names)
