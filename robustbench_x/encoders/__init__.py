"""Encoders: pixels in [0, 1] to features. What they are, and where they are loaded from."""

from robustbench_x.encoders.encoder import Classifier, Encoder, LoadedEncoder, Tokens
from robustbench_x.encoders.source import EncoderOptions, EncoderSource, load_encoder

__all__ = [
    "Classifier",
    "Encoder",
    "EncoderOptions",
    "EncoderSource",
    "LoadedEncoder",
    "Tokens",
    "load_encoder",
]
