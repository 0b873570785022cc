"""Image-text recall against a second implementation, which stands against a worked matrix and a ranking by sorting."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recall import recalls
from robustbench_x.errors import NothingEvaluatedError
from robustbench_x.imagetext.metrics import RANKS, Pairing


def rank_by_sorting(scores: list[float], right: set[int]) -> int:
    """The first right answer's place once the list is sorted, the wrong ones of equal score first."""
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], item in right))
    return next(place for place, item in enumerate(order, start=1) if item in right)


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    images, texts = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    # Few values, so that ties are common.
    values = draw(
        st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 3.0]), min_size=images * texts, max_size=images * texts)
    )
    owner = draw(st.lists(st.integers(-1, images - 1), min_size=texts, max_size=texts).filter(lambda o: max(o) >= 0))
    return np.array(values).reshape(images, texts), np.array(owner)


@settings(max_examples=300, deadline=None)
@given(cases(), st.sets(st.integers(1, 9), min_size=1))
def test_agrees_with_sorting(case: tuple[NDArray[np.float64], NDArray[np.int64]], cuts: set[int]) -> None:
    similarity, owner = case
    ks = sorted(cuts)
    tr = [
        rank_by_sorting(similarity[i].tolist(), own) if (own := {t for t, o in enumerate(owner) if o == i}) else 0
        for i in range(len(similarity))
    ]
    ir = [rank_by_sorting(similarity[:, t].tolist(), {int(o)}) if o >= 0 else 0 for t, o in enumerate(owner)]
    found = recalls(similarity, owner, ks)
    assert found.tr_ranks.tolist() == tr
    assert found.ir_ranks.tolist() == ir
    for ranks, shares in ((tr, found.tr), (ir, found.ir)):
        asked = [rank for rank in ranks if rank]
        assert shares == pytest.approx([sum(rank <= k for rank in asked) / len(asked) for k in ks])
    assert found.mean == pytest.approx(sum(found.tr + found.ir) / (2 * len(ks)))


def test_by_hand() -> None:
    # Image 0 owns texts 0 and 1, image 1 owns text 2, image 2 owns none, text 3 is a distractor.
    similarity = np.array([[0.5, 0.7, 0.8, 0.1], [0.1, 0.9, 0.6, 0.2], [0.4, 0.2, 0.7, 0.0]])
    found = recalls(similarity, np.array([0, 0, 1, -1]), ks=(1, 2, 3))
    # Row 0: its best is 0.7, behind 0.8. Row 1: its 0.6 is behind 0.9. Row 2 has nothing to find.
    assert found.tr_ranks.tolist() == [2, 2, 0]
    # Column 0: 0.5 leads. Column 1: 0.7 behind 0.9. Column 2: 0.6 behind 0.8 and 0.7, the latter of an unowned image.
    assert found.ir_ranks.tolist() == [1, 2, 3, 0]
    assert found.tr == (0.0, 1.0, 1.0)
    assert found.ir == pytest.approx((1 / 3, 2 / 3, 1.0))
    assert found.mean == pytest.approx((0 + 1 + 1 + 1 / 3 + 2 / 3 + 1) / 6)


def test_perfect_and_reversed() -> None:
    owner = np.repeat(np.arange(20), 5)
    similarity = (owner[None] == np.arange(20)[:, None]).astype(np.float32)
    best, worst = recalls(similarity, owner), recalls(-similarity, owner)
    assert best.mean == 1.0
    assert best.ks == (1, 5, 10)
    assert worst.mean == 0.0
    assert set(worst.tr_ranks) == {96}
    assert set(worst.ir_ranks) == {20}


def test_ties_count_against_the_query() -> None:
    owner = np.repeat(np.arange(4), 2)
    found = recalls(np.zeros((4, 8)), owner, ks=(3, 4, 6, 7))
    assert found.tr == (0.0, 0.0, 0.0, 1.0)
    assert found.ir == (0.0, 1.0, 1.0, 1.0)


def test_distractors_are_in_the_gallery_only() -> None:
    similarity = np.array([[0.5, 0.9], [0.1, 0.9]])
    found = recalls(similarity, np.array([0, -1]), ks=(1,))
    assert found.tr_ranks.tolist() == [2, 0]
    assert found.ir_ranks.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
def test_any_real_type(dtype: type[np.generic]) -> None:
    assert recalls(np.eye(3, dtype=dtype), np.arange(3, dtype=np.int32)).mean == 1.0


@pytest.mark.parametrize(
    ("similarity", "owner", "ks", "message"),
    [
        (np.zeros(3), np.zeros(3, int), (1,), r"shapes \(3,\) and \(3,\)"),
        (np.zeros((2, 3)), np.zeros(2, int), (1,), r"shapes \(2, 3\) and \(2,\)"),
        (np.zeros((2, 2), complex), np.zeros(2, int), (1,), "real numbers, got complex128"),
        (np.zeros((2, 2), bool), np.zeros(2, int), (1,), "real numbers, got bool"),
        (np.zeros((2, 2)), np.zeros(2), (1,), "integers.*got float64"),
        (np.zeros((2, 2)), np.zeros(2, bool), (1,), "integers.*got bool"),
        (np.array([[0.0, np.nan]]), np.zeros(2, int), (1,), "got 1 NaN or infinite of 2"),
        (np.array([[np.inf, -np.inf]]), np.zeros(2, int), (1,), "got 2 NaN or infinite of 2"),
        (np.zeros((2, 2)), np.array([0, 2]), (1,), r"\[-1, 2\).*got \[0, 2\]"),
        (np.zeros((2, 2)), np.array([-2, 1]), (1,), r"got \[-2, 1\]"),
        (np.zeros((2, 2)), np.zeros(2, int), (), "positive and ascending, got"),
        (np.zeros((2, 2)), np.zeros(2, int), (0, 1), "positive and ascending, got"),
        (np.zeros((2, 2)), np.zeros(2, int), (5, 1), "positive and ascending, got"),
        (np.zeros((2, 2)), np.zeros(2, int), (1, 1), "positive and ascending, got"),
    ],
)
def test_refuses(similarity: NDArray[Any], owner: NDArray[Any], ks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recalls(similarity, owner, ks)


@pytest.mark.parametrize(("images", "texts"), [(2, 3), (2, 0), (0, 2)])
def test_no_query_is_no_recall(images: int, texts: int) -> None:
    with pytest.raises(NothingEvaluatedError, match=f"none of the {texts} texts"):
        recalls(np.zeros((images, texts)), np.full(texts, -1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_metrics_of_a_report_are_the_same_recalls(images: int, captions: int, seed: int) -> None:
    # Few values, so that ties are common.
    scores = np.random.default_rng(seed).integers(0, 6, size=(images, images * captions)).astype(float)
    owner = np.repeat(np.arange(images), captions)
    other = recalls(scores, owner, RANKS)
    pairing = Pairing(clean=scores, adv=scores, group=owner)
    nowhere = np.full(images, -1)
    found = pairing.metrics(np.arange(images), nowhere, np.ones(images, dtype=bool))
    for prefix in ("clean_", ""):
        for k, tr, ir in zip(RANKS, other.tr, other.ir, strict=True):
            assert found[f"{prefix}tr@{k}"].value == pytest.approx(tr)
            assert found[f"{prefix}ir@{k}"].value == pytest.approx(ir)
        assert found[f"{prefix}r@mean"].value == pytest.approx(other.mean)
