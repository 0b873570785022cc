"""The heads that ship with the core."""

from robustbench_x.heads import knn, linear, mlp, prototype, reader, retrieval, text
from robustbench_x.heads.base import HeadSpec
from robustbench_x.heads.tuning.adapter import adapter
from robustbench_x.heads.tuning.full import full
from robustbench_x.heads.tuning.lora import lora
from robustbench_x.heads.tuning.scheme import Scheme

__all__ = ["HEADS", "tuned"]


def tuned(scheme: Scheme, summary: str) -> HeadSpec:
    """The head of a fine-tuning scheme: a copy of the encoder tuned by it, under a linear classifier."""
    return HeadSpec(name=scheme.name, summary=summary, restore=linear.restore, settings=scheme.settings, tune=scheme)


HEADS: tuple[HeadSpec, ...] = (
    HeadSpec(name="native", summary="the classifier that the encoder was published with"),
    linear.SPEC,
    mlp.SPEC,
    knn.SPEC,
    prototype.SPEC,
    retrieval.SPEC,
    text.ZERO_SHOT,
    text.CAPTIONS,
    *reader.READERS,
    tuned(lora(), "tuned victim: low-rank updates of a copy of the encoder (LoRA), and a linear classifier"),
    tuned(adapter(), "tuned victim: bottlenecks after the layers of a copy of the encoder, and a linear classifier"),
    tuned(full(), "tuned victim: every weight of a copy of the encoder, and a linear classifier"),
    HeadSpec(name="file", summary="a saved head: file:HEAD.safetensors"),
)
