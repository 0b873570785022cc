"""A small encoder that reads text, exactly known: features and texts live in a space of four classes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from project import CLASSES, SIDE, patterns, save_image
from robustbench_x.encoders.encoder import Encoder, LoadedEncoder, Preprocessing
from robustbench_x.encoders.text import TextTower

__all__ = ["READS", "reads", "write_captions"]

READS = "python:reading:reads"


class _Space(nn.Module):
    """Pixels to how much of each class's pattern they hold."""

    layers = ()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(patterns().flatten(1) / (3 * SIDE * SIDE))

    def pooled(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Any]:
        return []


def _words(texts: Sequence[str]) -> Tensor:
    """A text is where the class it names is, a little off for every further word."""
    made = torch.zeros(len(texts), len(CLASSES))
    for row, text in zip(made, texts, strict=True):
        named = next(i for i, name in enumerate(CLASSES) if name in text)
        row[named] = 1.0
        row[(named + 1) % len(CLASSES)] += 0.01 * len(text.split())
    return made


def reads() -> LoadedEncoder:
    """The encoder with its text side."""
    encoder = Encoder(source=READS, backbone=_Space(), preprocessing=Preprocessing(input_size=(SIDE, SIDE)))
    return LoadedEncoder(encoder, None, TextTower(embed=_words, scale=20.0, sha256="words"))


def write_captions(folder: Path, captions: Mapping[str, Sequence[str]]) -> Path:
    """An image of each class that is named by the stem's first word, and a JSON of its captions."""
    generator = torch.Generator().manual_seed(3)
    entries = []
    for name, texts in captions.items():
        pattern = patterns()[CLASSES.index(name.split("_")[0])]
        noise = torch.randn(pattern.shape, generator=generator)
        save_image(folder / f"{name}.png", 0.5 + 0.06 * pattern + 0.02 * noise)
        entries.append({"image": f"{name}.png", "caption": list(texts)})
    path = folder / "captions.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path
