"""Image-text encoders through transformers: `hf:ORG/NAME` from the hub, `hf:/FOLDER` from disk."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder, LoadedEncoder, Preprocessing
from robustbench_x.encoders.hooked import HookedBackbone
from robustbench_x.encoders.hub import files_sha256, model_folder
from robustbench_x.encoders.source import EncoderOptions, EncoderSource
from robustbench_x.encoders.text import TextTower
from robustbench_x.encoders.transformers_loading import (
    import_transformers,
    load_pretrained,
    load_tokenizer,
    read_config,
    read_preprocessing,
)
from robustbench_x.errors import ConfigError, SourceError

__all__ = ["SOURCE"]

_BATCH = 64


class _Towers(NamedTuple):
    """A model taken apart: each side with only its own weights, and functions of them."""

    vision: nn.Module
    pooled: Callable[[Any, Tensor], Tensor]
    num_prefix: int
    text: nn.Module
    embed: Callable[[Any, Tensor, Tensor], Tensor]
    padding: str
    scale: float
    notes: tuple[str, ...] = ()


def _clip(model: Any, options: dict[str, Any]) -> _Towers:
    return _Towers(
        vision=nn.ModuleDict({"model": model.vision_model, "projection": model.visual_projection}),
        # The towers' own outputs, not get_image_features: that is a tensor up to transformers 4 and an object after.
        pooled=lambda vision, images: vision["projection"](vision["model"](images, **options).pooler_output),
        num_prefix=1,
        text=nn.ModuleDict({"model": model.text_model, "projection": model.text_projection}),
        embed=lambda text, ids, mask: text["projection"](text["model"](ids, attention_mask=mask).pooler_output),
        padding="longest",
        scale=model.logit_scale.exp().item(),
    )


def _siglip(model: Any, options: dict[str, Any]) -> _Towers:
    return _Towers(
        vision=nn.ModuleDict({"model": model.vision_model}),
        pooled=lambda vision, images: vision["model"](images, **options).pooler_output,
        num_prefix=0,
        text=nn.ModuleDict({"model": model.text_model}),
        # Trained on texts padded to full length without a mask, and read at the last position.
        embed=lambda text, ids, _mask: text["model"](ids).pooler_output,
        padding="max_length",
        scale=model.logit_scale.exp().item(),
        notes=(f"its logit bias {model.logit_bias.item():.4g} is left out: it moves every text's logit alike",),
    )


def _blip(model: Any, options: dict[str, Any]) -> _Towers:
    return _Towers(
        vision=nn.ModuleDict({"model": model.vision_model, "projection": model.vision_proj}),
        pooled=lambda vision, images: vision["projection"](vision["model"](images, **options).last_hidden_state[:, 0]),
        num_prefix=1,
        text=nn.ModuleDict({"model": model.text_encoder, "projection": model.text_proj}),
        embed=lambda text, ids, mask: text["projection"](
            text["model"](ids, attention_mask=mask).last_hidden_state[:, 0]
        ),
        padding="longest",
        scale=1 / 0.07,
        notes=("the published files lack BLIP's temperature; 0.07, where its training starts, is used",),
    )


_FAMILIES = {"CLIPModel": _clip, "SiglipModel": _siglip, "BlipForImageTextRetrieval": _blip}
_DEFAULTS = {"clip": "CLIPModel", "siglip": "SiglipModel"}


def _load(source: str, rest: str, options: EncoderOptions) -> LoadedEncoder:
    import_transformers(source)
    folder = model_folder(source, rest, allow_pickle=options.allow_pickle)
    config = read_config(folder, source)
    kind = _kind(config, source)
    preprocessing = read_preprocessing(folder, source, size=options.size)
    tokenizer = load_tokenizer(folder, source)
    model, sha256 = load_pretrained(kind, folder, source, allow_pickle=options.allow_pickle)
    resamples = _resamples(source, model.config.vision_config, preprocessing)
    towers = _FAMILIES[kind](model, {"interpolate_pos_encoding": True} if resamples else {})
    blocks = tuple(f"model.encoder.layers.{i}" for i in range(model.config.vision_config.num_hidden_layers))
    parts = {f"{name}.attn": f"{name}.self_attn" for name in blocks} | {f"{name}.mlp": f"{name}.mlp" for name in blocks}
    encoder = Encoder(
        source=source,
        backbone=HookedBackbone(towers.vision, towers.pooled, blocks=blocks, parts=parts, num_prefix=towers.num_prefix),
        preprocessing=preprocessing,
        sha256=sha256,
        notes=(*towers.notes, *(("position embeddings were resampled to the size asked for",) if resamples else ())),
    )
    limit = int(model.config.text_config.max_position_embeddings)
    return LoadedEncoder(encoder, None, _text_tower(source, folder, limit, towers, tokenizer, sha256))


SOURCE = EncoderSource(
    scheme="hf",
    usage="hf:ORG/NAME, hf:/FOLDER",
    summary="CLIP, SigLIP or BLIP retrieval with its text side, through transformers: from the hub or a local folder",
    load=_load,
)


def _kind(config: dict[str, Any], source: str) -> str:
    named = [str(name) for name in config.get("architectures") or [_DEFAULTS.get(config["model_type"], "")]]
    found = next((name for name in named if name in _FAMILIES), None)
    if found is None:
        raise SourceError(
            f"{source} is a {', '.join(named) or config['model_type']}; image-text encoders are "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    return found


def _resamples(source: str, vision: Any, preprocessing: Preprocessing) -> bool:
    """Whether the position embeddings must be resampled, because another size was asked for."""
    height, width = preprocessing.input_size
    patch = int(vision.patch_size)
    if height % patch or width % patch:
        below = max(height // patch, 1) * patch
        raise ConfigError(
            f"{source}: size {height} is no multiple of the patch size {patch}; use {below} or {below + patch}"
        )
    return (height, width) != (int(vision.image_size),) * 2


def _text_tower(source: str, folder: Path, limit: int, towers: _Towers, tokenizer: Any, sha256: str) -> TextTower:
    if tokenizer.pad_token_id is None:
        raise SourceError(f"{source}: its tokenizer has no padding token")

    def embed(texts: Sequence[str]) -> Tensor:
        device = next(towers.text.parameters()).device
        rows: list[Tensor] = []
        for start in range(0, len(texts), _BATCH):
            found = tokenizer(
                list(texts[start : start + _BATCH]),
                padding=towers.padding,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            ).to(device)
            mask = found.get("attention_mask", torch.ones_like(found["input_ids"]))
            rows.append(towers.embed(towers.text, found["input_ids"], mask))
        return torch.cat(rows)

    if not math.isfinite(towers.scale):
        raise SourceError(f"{source}: its logit scale is {towers.scale}")
    vocabulary = [path for path in map(folder.joinpath, _VOCABULARIES) if path.is_file()]
    digests = {path.name: files_sha256([path]) for path in vocabulary} | {"weights": sha256}
    return TextTower(embed=embed, scale=towers.scale, sha256=files_sha256(digests), module=towers.text)


_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model")
