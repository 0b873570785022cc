"""The heads that ship with the core."""

from robustbench_x.heads import knn, linear, mlp, prototype, retrieval
from robustbench_x.heads.base import HeadSpec

__all__ = ["HEADS"]

HEADS: tuple[HeadSpec, ...] = (
    HeadSpec(name="native", summary="the classifier that the encoder was published with"),
    linear.SPEC,
    mlp.SPEC,
    knn.SPEC,
    prototype.SPEC,
    retrieval.SPEC,
    HeadSpec(name="file", summary="a saved head: file:HEAD.safetensors"),
)
