"""Image-text retrieval from a similarity matrix: ranks of every query, TR@k, IR@k and their mean.

TR asks with an image for its texts and counts the best-ranked of them, IR asks with a text for its image, as image-text
retrieval on MSCOCO and Flickr30k is reported (Karpathy and Fei-Fei, CVPR 2015).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustbench_x.errors import NothingEvaluatedError

__all__ = ["Recalls", "recalls"]

_DISTRACTOR = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Recalls:
    """Ranks from 1 (best), with 0 for what was no query, and the shares of the queries ranked k or better.

    Attributes:
        ks: The cut-offs, ascending.
        tr_ranks: `(N,)` int64, of the first own text of each image; 0 for an image that has no text.
        ir_ranks: `(M,)` int64, of each text's image; 0 for a distractor.
        tr: TR@k in [0, 1], one for each of `ks`, over the images with a text.
        ir: IR@k in [0, 1], one for each of `ks`, over the texts with an image.
    """

    ks: tuple[int, ...]
    tr_ranks: NDArray[np.int64]
    ir_ranks: NDArray[np.int64]
    tr: tuple[float, ...]
    ir: tuple[float, ...]

    @property
    def mean(self) -> float:
        """R@Mean in [0, 1], the mean of every TR@k and IR@k: six of them at the usual 1, 5 and 10."""
        return float(np.mean(self.tr + self.ir))


def recalls(similarity: NDArray[Any], owner: NDArray[np.integer[Any]], ks: Sequence[int] = (1, 5, 10)) -> Recalls:
    """Recall in both directions.

    A tie counts against the query: what is as similar as the right answer is ranked before it, so that a model
    which finds everything alike recalls nothing. Texts of one image do not compete with each other.
    Takes O(N M) time and, besides the matrix, O(N + M) memory.

    >>> recalls(np.array([[0.9, 0.1, 0.3], [0.2, 0.1, 0.8]]), np.array([0, 0, 1]), ks=(1, 2)).ir_ranks.tolist()
    [1, 2, 1]

    Args:
        similarity: `(N, M)` real and finite, image by text, higher is more similar.
        owner: `(M,)` integers in [-1, N), the row of the image that a text describes. A text of -1 is a distractor:
            no IR query, but in the gallery of TR. An image that owns no text is no TR query, but in the gallery of IR.
        ks: Positive, ascending. One larger than the gallery is allowed and recalls everything.

    Raises:
        ValueError: A shape, type or value is not as above.
        NothingEvaluatedError: No text has an image, so there is no query.
    """
    similarity, owner = np.asarray(similarity), np.asarray(owner)
    _check(similarity, owner, ks)
    has_image = owner != _DISTRACTOR
    if not has_image.any():
        raise NothingEvaluatedError(f"none of the {len(owner)} texts belongs to an image, so there is no query to rank")
    right = np.where(has_image, similarity[owner, np.arange(len(owner))], np.inf)
    tr_ranks = np.zeros(len(similarity), dtype=np.int64)
    # A text's own image is as similar as itself: that one is its rank's 1.
    ir_ranks = np.zeros(len(owner), dtype=np.int64)
    for image, row in enumerate(similarity):
        ir_ranks += row >= right
        own = owner == image
        if own.any():
            tr_ranks[image] = 1 + np.count_nonzero(row[~own] >= row[own].max())
    return Recalls(
        ks=tuple(int(k) for k in ks),
        tr_ranks=tr_ranks,
        ir_ranks=ir_ranks,
        tr=_shares(tr_ranks, ks),
        ir=_shares(ir_ranks, ks),
    )


def _shares(ranks: NDArray[np.int64], ks: Sequence[int]) -> tuple[float, ...]:
    asked = ranks[ranks > 0]
    return tuple(float(np.mean(asked <= k)) for k in ks)


def _check(similarity: NDArray[Any], owner: NDArray[Any], ks: Sequence[int]) -> None:
    if similarity.ndim != 2 or owner.shape != similarity.shape[1:]:
        raise ValueError(
            f"expected similarity (images, texts) and owner (texts,), got shapes {similarity.shape} and {owner.shape}"
        )
    if similarity.dtype.kind not in "fiu":
        raise ValueError(f"similarity must be real numbers, got {similarity.dtype}")
    if owner.dtype.kind not in "iu":
        raise ValueError(f"owner must hold integers, the row of each text's image, got {owner.dtype}")
    bad = similarity.size - np.count_nonzero(np.isfinite(similarity))
    if bad:
        raise ValueError(f"similarity must be finite, got {bad} NaN or infinite of {similarity.size} values")
    if owner.size and not (owner.min() >= _DISTRACTOR and owner.max() < len(similarity)):
        raise ValueError(
            f"owner must lie in [-1, {len(similarity)}), -1 for no image, got [{owner.min()}, {owner.max()}]"
        )
    if not ks or any(k < 1 for k in ks) or any(a >= b for a, b in pairwise(ks)):
        raise ValueError(f"ks must be positive and ascending, got {list(ks)}")
