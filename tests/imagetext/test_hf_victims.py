"""Readers on tiny random models: each skill against the model's own forward pass and `generate`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from robustbench_x.errors import ConfigError, RangeError, SourceError
from robustbench_x.imagetext.victims import Decoding, LoadedReader, Reader, load_reader
from tiny_hub import MODELS, save_tiny

_KINDS = [kind for kind in MODELS if kind not in ("clip", "siglip")]
_WRITERS = [kind for kind in _KINDS if not kind.endswith("itm")]
_TALKERS = [kind for kind in _WRITERS if kind != "blip_caption"]
_TEXTS = ["a photo of a dog", "cat", "the small red ship on the tree"]
_QUESTIONS = ["is it a dog ?", "is there a small red cat in the photo ?"]
_CHOICES = ["yes", "no", "maybe yes"]
_SHORT = {"min_new_tokens": 2, "max_new_tokens": 6}
_PROMPTS = {
    "blip_caption": "a picture of",
    "instructblip_llama": "A short image caption.",
    "instructblip_t5": "A short image caption.",
    "llava": "Describe this image in one short sentence only.",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in _KINDS}


@pytest.fixture(scope="module")
def readers(folders: dict[str, Path]) -> dict[str, LoadedReader]:
    return {
        kind: load_reader(
            f"hf:{folder}",
            decoding=Decoding(prompt=_PROMPTS.get(kind, "a photo of"), num_beams=1 if kind == "llava" else 3, **_SHORT)
            if kind in _WRITERS
            else None,
        )
        for kind, folder in folders.items()
    }


def _images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _pixels(reader: LoadedReader, images: Tensor) -> Tensor:
    return (images - reader.mean) / reader.std


@pytest.mark.parametrize("kind", _KINDS)
def test_skills_shapes_and_gradients(kind: str, readers: dict[str, LoadedReader]) -> None:
    reader: Reader = readers[kind]
    assert reader.input_size == (32, 32)
    assert reader.can == {"match"} | ({"caption"} if kind in _WRITERS else set()) | (
        {"answer"} if kind in _TALKERS else set()
    )
    images = _images().requires_grad_()
    scores = [reader.match(images, _TEXTS)]
    if "answer" in reader.can:
        scores.append(reader.answer(images, _QUESTIONS, _CHOICES))
        assert (scores[1] < 0).all()
    for score in scores:
        assert score.shape == (2, 3)
        assert score.dtype == torch.float32
        gradient = torch.autograd.grad(score[:, 0].sum(), images)[0]
        assert (gradient != 0).float().mean() > 0.9
        assert (score[0] - score[1]).abs().max() > 1e-4  # the image matters
    if "caption" in reader.can:
        captions = reader.caption(images.detach())
        assert len(captions) == 2
        assert captions == reader.caption(images.detach())


@pytest.mark.parametrize("kind", _KINDS)
@torch.no_grad()
def test_scores_do_not_depend_on_company(kind: str, readers: dict[str, LoadedReader]) -> None:
    # Padding, chunks and neighbours must not leak into a row.
    reader, images = readers[kind], _images(3)
    together = reader.match(images, _TEXTS * 9)[:, :3]
    alone = torch.cat([torch.cat([reader.match(i[None], [t]) for t in _TEXTS], dim=1) for i in images])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    if "answer" in reader.can:
        both = reader.answer(images[:2], _QUESTIONS, _CHOICES)
        second = reader.answer(images[1:2], _QUESTIONS[1:], _CHOICES)
        torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["blip_itm", "blip2_itm"])
@torch.no_grad()
def test_matching_heads_are_the_models_own(
    kind: str, readers: dict[str, LoadedReader], folders: dict[str, Path]
) -> None:
    reader, images = readers[kind], _images(1)
    tokens = _tokenizer(folders[kind])(_TEXTS, padding=True, return_tensors="pt")
    pixels = _pixels(reader, images).expand(len(_TEXTS), -1, -1, -1)
    model: Any = reader.model
    if kind == "blip_itm":
        logits = model(**tokens, pixel_values=pixels).itm_score
    else:
        logits = model(**tokens, pixel_values=pixels, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(reader.match(images, _TEXTS)[0], logits[:, 1] - logits[:, 0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_blips_captioner_scores_as_its_own_loss(readers: dict[str, LoadedReader], folders: dict[str, Path]) -> None:
    reader, images = readers["blip_caption"], _images(1)
    model: Any = reader.model
    for i, text in enumerate(_TEXTS):
        ids = _tokenizer(folders["blip_caption"])(text, return_tensors="pt")["input_ids"]
        ids[:, 0] = 95
        loss = model(pixel_values=_pixels(reader, images), input_ids=ids, labels=ids).loss
        torch.testing.assert_close(reader.match(images, _TEXTS)[0, i], -loss, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", _TALKERS)
@torch.no_grad()
def test_answers_are_the_models_own_likelihoods(
    kind: str, readers: dict[str, LoadedReader], folders: dict[str, Path]
) -> None:
    # Through the public forward pass, with image placeholders in the prompt, one choice at a time.
    reader, images = readers[kind], _images()
    model: Any = reader.model
    tokenizer = _tokenizer(folders[kind])
    for n, question in enumerate(_QUESTIONS):
        for c, choice in enumerate(_CHOICES):
            inputs = _inputs(kind, folders[kind], _asked(kind, question))
            target = torch.tensor([tokenizer(choice, add_special_tokens=kind.endswith("t5"))["input_ids"]])
            pixels = _pixels(reader, images[n : n + 1])
            if kind.endswith("t5"):
                expected = -model(pixel_values=pixels, labels=target, **inputs).loss * target.shape[1]
            else:
                inputs["input_ids"] = torch.cat([inputs["input_ids"], target], dim=1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                logits = model(pixel_values=pixels, **inputs).logits[0, -target.shape[1] - 1 : -1]
                expected = logits.log_softmax(dim=1).gather(1, target.T).sum()
            found = reader.answer(images, _QUESTIONS, _CHOICES)[n, c]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", _WRITERS)
@torch.no_grad()
def test_captions_are_the_models_own(kind: str, readers: dict[str, LoadedReader], folders: dict[str, Path]) -> None:
    reader, images = readers[kind], _images()
    model: Any = reader.model
    tokenizer = _tokenizer(folders[kind])
    options = {**_SHORT, "num_beams": 1 if kind == "llava" else 3, "do_sample": False}
    captions = []
    for image in images:
        pixels = _pixels(reader, image[None])
        if kind == "blip_caption":
            ids = tokenizer("a picture of", return_tensors="pt")["input_ids"]
            tokens = model.generate(pixel_values=pixels, input_ids=ids, **options)[:, ids.shape[1] - 1 :]
        else:
            inputs = _inputs(kind, folders[kind], _described(kind))
            tokens = model.generate(pixel_values=pixels, pad_token_id=tokenizer.pad_token_id, **inputs, **options)
            if not kind.endswith("t5"):
                tokens = tokens[:, inputs["input_ids"].shape[1] :]
        captions.append(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    assert reader.caption(images) == captions


def test_pixels_are_those_of_the_image_processor(readers: dict[str, LoadedReader], folders: dict[str, Path]) -> None:
    import transformers

    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(levels)
    for kind, processor in (
        ("blip_itm", transformers.BlipImageProcessor),
        ("llava", transformers.CLIPImageProcessor),
    ):
        expected = torch.as_tensor(processor.from_pretrained(folders[kind])(image, return_tensors="pt")["pixel_values"])
        pixels = torch.from_numpy(levels).permute(2, 0, 1)[None] / 255
        found = readers[kind].normalised(pixels)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # A larger square, resized inside: the processor rounds to 8 bits after its resize.
    ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    reader = readers["blip_itm"]
    expected = transformers.BlipImageProcessor.from_pretrained(folders["blip_itm"])(
        PIL.Image.fromarray(ramp), return_tensors="pt"
    )["pixel_values"]
    found = reader.normalised(torch.from_numpy(ramp).permute(2, 0, 1)[None] / 255)
    assert ((found - torch.as_tensor(expected)) * reader.std).abs().max() <= 1.5 / 255


def test_a_skill_that_is_not_there_is_named(readers: dict[str, LoadedReader]) -> None:
    images = _images()
    with pytest.raises(SourceError, match="cannot caption: a BlipForImageTextRetrieval can match"):
        readers["blip_itm"].caption(images)
    with pytest.raises(SourceError, match="cannot answer: a BlipForConditionalGeneration can caption and match"):
        readers["blip_caption"].answer(images, _QUESTIONS, _CHOICES)
    with pytest.raises(ConfigError, match="1 questions and 3 choices for 2 images; give one question for each"):
        readers["llava"].answer(images, _QUESTIONS[:1], _CHOICES)
    with pytest.raises(ConfigError, match="there is no text to match"):
        readers["blip_itm"].match(images, [])
    with pytest.raises(RangeError, match=r"pixels must lie in \[0, 1\]"):
        readers["blip_itm"].match(images * 2 - 1, _TEXTS)


def test_what_is_no_reader_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write hf:ORG/NAME or hf:/FOLDER"):
        load_reader("timm:resnet18")
    with pytest.raises(SourceError, match=r"needs a network .* hf download Salesforce/blip-itm-base-coco"):
        load_reader("hf:Salesforce/blip-itm-base-coco")
    with pytest.raises(ConfigError, match="a BlipForImageTextRetrieval writes no captions"):
        load_reader(
            f"hf:{folders['blip_itm']}",
            decoding=Decoding(prompt="", num_beams=1, min_new_tokens=1, max_new_tokens=2),
        )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}))
    with pytest.raises(SourceError, match=r"is a CLIPModel; readers are .*; it is an image-text encoder"):
        load_reader(f"hf:{tmp_path}")


def test_a_folder_without_its_tokenizers_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["instructblip_llama"].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SourceError, match="/qformer_tokenizer has no tokenizer that loads"):
        load_reader(f"hf:{tmp_path}")


def _tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def _asked(kind: str, question: str) -> str:
    ways: dict[str, Callable[[str], str]] = {
        "blip2_opt": "Question: {} Answer:".format,
        "blip2_t5": "Question: {} Answer:".format,
        "llava": "USER: <image>\n{} ASSISTANT:".format,
    }
    return ways.get(kind, "{}".format)(question)


def _described(kind: str) -> str:
    prompt = _PROMPTS.get(kind, "a photo of")
    return _asked(kind, prompt) if kind == "llava" else prompt


def _inputs(kind: str, folder: Path, prompt: str) -> dict[str, Tensor]:
    """What the family's processor makes of a prompt: image placeholders first, or where `<image>` stands."""
    import transformers

    ids: list[int] = _tokenizer(folder)(prompt)["input_ids"]
    if kind == "llava":
        place = ids.index(119)
        ids = [*ids[:place], *[119] * 16, *ids[place + 1 :]]
    else:
        ids = [*[119] * 4, *ids]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if kind.startswith("instructblip"):
        tokens = transformers.AutoTokenizer.from_pretrained(folder / "qformer_tokenizer")(prompt, return_tensors="pt")
        inputs |= {f"qformer_{name}": tokens[name] for name in ("input_ids", "attention_mask")}
    return inputs
