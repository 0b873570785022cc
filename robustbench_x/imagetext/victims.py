"""Vision-language models to attack: BLIP, BLIP-2, InstructBLIP and LLaVA by name or folder, behind one `Reader`."""

from pathlib import Path
from typing import Any, NamedTuple

from robustbench_x.encoders.hub import model_folder
from robustbench_x.encoders.transformers_loading import (
    import_transformers,
    load_pretrained,
    load_tokenizer,
    read_config,
    read_preprocessing,
)
from robustbench_x.errors import ConfigError, SourceError
from robustbench_x.imagetext import blip, generative
from robustbench_x.imagetext.reader import Decoding, LoadedReader, Reader, Skills

__all__ = ["Decoding", "LoadedReader", "Reader", "load_reader"]


class _Family(NamedTuple):
    """A class of transformers, and how its authors have it write captions (None: it writes none)."""

    model_type: str
    decoding: Decoding | None


# Prompts, beams and lengths as in LAVIS, which AnyAttack and most of its peers evaluate with (it counts BLIP's prompt
# of four tokens in its 5 to 20). LLaVA is not in LAVIS: greedy, cut at 64 tokens.
_FAMILIES = {
    "BlipForImageTextRetrieval": _Family("blip", None),
    "BlipForConditionalGeneration": _Family(
        "blip", Decoding(prompt="a picture of", num_beams=3, min_new_tokens=1, max_new_tokens=16)
    ),
    "Blip2ForImageTextRetrieval": _Family("blip-2", None),
    "Blip2ForConditionalGeneration": _Family(
        "blip-2", Decoding(prompt="a photo of", num_beams=5, min_new_tokens=8, max_new_tokens=30)
    ),
    "InstructBlipForConditionalGeneration": _Family(
        "instructblip", Decoding(prompt="A short image caption.", num_beams=5, min_new_tokens=10, max_new_tokens=80)
    ),
    "LlavaForConditionalGeneration": _Family(
        "llava",
        Decoding(
            prompt="Describe this image in one short sentence only.", num_beams=1, min_new_tokens=1, max_new_tokens=64
        ),
    ),
}


def load_reader(source: str, *, allow_pickle: bool = False, decoding: Decoding | None = None) -> LoadedReader:
    """The vision-language model that `source` names, frozen, in eval mode, in float32 on the CPU.

    Args:
        source: `hf:ORG/NAME` from the hub, or `hf:/FOLDER` in the hub's layout.
        allow_pickle: Reads pickled weights, which may run code while they load. Only for files you trust.
        decoding: How captions are written; the authors' settings when None.

    Raises:
        ConfigError: The source is not an `hf:` source, or this model writes no captions to decode.
        SourceError: The model is of another family, or its files are not there or incomplete.
        MissingExtraError: transformers is not installed.
    """
    scheme, _, name = source.partition(":")
    if scheme != "hf" or not name:
        raise ConfigError(f"reader '{source}': write hf:ORG/NAME or hf:/FOLDER")
    import_transformers(source)
    folder = model_folder(source, name, allow_pickle=allow_pickle)
    kind = _kind(read_config(folder, source), source)
    published = _FAMILIES[kind].decoding
    if decoding is not None and published is None:
        raise ConfigError(f"reader '{source}': a {kind} writes no captions, so it takes no decoding")
    preprocessing = read_preprocessing(folder, source)
    tokenizer = load_tokenizer(folder, source)
    model, sha256 = load_pretrained(kind, folder, source, allow_pickle=allow_pickle)
    return LoadedReader(
        source=source,
        model=model,
        skills=_skills(kind, source, folder, model, tokenizer, decoding or published),
        preprocessing=preprocessing,
        sha256=sha256,
    )


def _kind(config: dict[str, Any], source: str) -> str:
    named = [str(name) for name in config.get("architectures") or ()]
    if not named:
        # Without a class, the one that writes: what a bare configuration of that type is for.
        named = [
            name for name, family in _FAMILIES.items() if family.model_type == config["model_type"] and family.decoding
        ]
    found = next((name for name in named if name in _FAMILIES), None)
    if found is None:
        what = ", ".join(named) or config["model_type"]
        hint = "; it is an image-text encoder, so name it as one" if config["model_type"] in ("clip", "siglip") else ""
        raise SourceError(f"{source} is a {what}; readers are {', '.join(sorted(_FAMILIES))}{hint}")
    return found


def _skills(kind: str, source: str, folder: Path, model: Any, tokenizer: Any, decoding: Decoding | None) -> Skills:
    if kind == "BlipForImageTextRetrieval":
        return blip.blip_matching(model, tokenizer)
    if kind == "Blip2ForImageTextRetrieval":
        return blip.blip2_matching(model, tokenizer)
    assert decoding is not None
    if kind == "BlipForConditionalGeneration":
        return blip.blip_captioning(model, tokenizer, decoding)
    if kind == "Blip2ForConditionalGeneration":
        return generative.blip2(source, model, tokenizer, decoding)
    if kind == "LlavaForConditionalGeneration":
        return generative.llava(source, model, tokenizer, decoding)
    qformer_tokenizer = load_tokenizer(folder, source, subfolder="qformer_tokenizer")
    return generative.instructblip(source, model, tokenizer, qformer_tokenizer, decoding)
