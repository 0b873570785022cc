"""Retrieval against loops over gallery and relevant items, and the way it is fitted, saved and read again."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from robustbench_x.data.dataset import Dataset, Item
from robustbench_x.encoders.encoder import Encoder, LoadedEncoder, Preprocessing, Tokens
from robustbench_x.errors import DataError
from robustbench_x.heads import retrieval
from robustbench_x.heads.base import FittedHead
from robustbench_x.heads.build import build_head
from robustbench_x.heads.catalogue import HEADS
from robustbench_x.heads.retrieval import RetrievalHead, average_precision, fit, restore
from robustbench_x.heads.saved import read_head, save_head
from robustbench_x.registry import Registry

CLASSES = ("red", "green", "blue")


def _relevance(rows: int, items: int, share: float, *, seed: int = 0) -> Tensor:
    return torch.rand(rows, items, generator=torch.Generator().manual_seed(seed)) < share


def _precision(relevant: Sequence[bool], k: int) -> float:
    """AP@k of one row, item by item."""
    found, total = 0, 0.0
    for place, hit in enumerate(relevant[:k], start=1):
        if hit:
            found += 1
            total += found / place
    possible = min(k, sum(relevant))
    return total / possible if possible else 0.0


def _ordered(gallery: Tensor, query: Tensor) -> list[int]:
    """Gallery items by their cosine to `query`, best first."""
    rows = gallery.double().numpy()
    point = query.double().numpy()
    cosines = [float(row @ point / np.linalg.norm(row) / np.linalg.norm(point)) for row in rows]
    return sorted(range(len(rows)), key=lambda item: -cosines[item])


def _problem(items: int = 60, queries: int = 40, classes: int = 5, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """A gallery of overlapping clusters with its labels, and queries from the same."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(items) % classes
    gallery = centres[labels] + torch.randn(items, dim, generator=generator)
    asked = centres[torch.arange(queries) % classes] + torch.randn(queries, dim, generator=generator)
    return 3 * gallery, labels, asked


@pytest.mark.parametrize("share", [0.02, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("k", [1, 2, 10, 29, 30, 100])
def test_average_precision_equals_the_loop(k: int, share: float) -> None:
    relevant = _relevance(50, 30, share)
    expected = [_precision(row, k) for row in relevant.tolist()]
    np.testing.assert_allclose(average_precision(relevant, k).numpy(), expected, atol=1e-12)


def test_average_precision_worked_by_hand() -> None:
    # Hits at places 1, 3 and 6 of six: (1/1 + 2/3) / 3 in the first five, 1/2 more at place 6.
    row = torch.tensor([[True, False, True, False, False, True]])
    expected = {1: 1.0, 2: 1 / 2, 3: (1 + 2 / 3) / 3, 5: (1 + 2 / 3) / 3, 6: (1 + 2 / 3 + 1 / 2) / 3}
    for k, value in expected.items():
        assert average_precision(row, k).tolist() == pytest.approx([value])


def test_average_precision_is_one_for_a_perfect_and_zero_for_a_lost_ranking() -> None:
    few = torch.tensor([[True, True, False, False, False], [False, False, False, True, True], [False] * 5])
    assert average_precision(few, 3).tolist() == [1.0, 0.0, 0.0]
    assert average_precision(few, 2).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("k", [30, 45])
def test_average_precision_of_the_whole_gallery_is_scikit_learns(k: int) -> None:
    relevant = _relevance(40, 30, 0.3, seed=1)
    relevant = relevant[relevant.any(dim=1)]
    scores = -np.arange(30)
    expected = [average_precision_score(row, scores) for row in relevant.numpy()]
    np.testing.assert_allclose(average_precision(relevant, k).numpy(), expected, atol=1e-12)


def test_rank_equals_the_loop() -> None:
    gallery, labels, queries = _problem()
    asked = torch.arange(len(queries)) % 5
    ranking = fit(gallery, labels, 5, 0).rank(queries, asked)
    precision, first = [], []
    for query, label in zip(queries, asked.tolist(), strict=True):
        relevant = [int(labels[item]) == label for item in _ordered(gallery, query)]
        precision.append(_precision(relevant, 10))
        first.append(relevant.index(True) + 1)
    assert ranking.first.tolist() == first
    np.testing.assert_allclose(ranking.precision.numpy(), precision, atol=1e-12)
    assert len(set(first)) > 4, "the premise: queries of every kind"


def test_fewer_relevant_items_than_places() -> None:
    gallery = torch.eye(12)
    labels = torch.tensor([0, 0, *[1] * 10])
    query = torch.tensor([[1.0, 0.9, *[0.0] * 10]])
    ranking = fit(gallery, labels, 2, 0).rank(query, torch.tensor([0]))
    assert (ranking.precision.tolist(), ranking.first.tolist()) == ([1.0], [1.0])


def test_a_query_may_be_one_or_none() -> None:
    gallery, labels, queries = _problem()
    head = fit(gallery, labels, 5, 0)
    whole = head.rank(queries, torch.zeros(40, dtype=torch.long))
    alone = head.rank(queries[7:8], torch.zeros(1, dtype=torch.long))
    assert float(alone.first) == float(whole.first[7])
    empty = head.rank(queries[:0], torch.zeros(0, dtype=torch.long))
    assert (empty.precision.shape, empty.first.shape) == ((0,), (0,))


def test_the_prediction_is_the_class_of_the_first_item() -> None:
    gallery, labels, queries = _problem(queries=200)
    head = fit(gallery, labels, 5, 0)
    first = torch.tensor([int(labels[_ordered(gallery, query)[0]]) for query in queries])
    assert torch.equal(head(queries).argmax(dim=1), first)
    assert set(first.tolist()) == set(range(5))
    asked = torch.arange(200) % 5
    assert torch.equal(head.rank(queries, asked).first == 1, first == asked)


def test_logits_are_the_best_cosine_of_each_class() -> None:
    gallery, labels, queries = _problem(queries=10)
    expected = np.full((10, 5), -np.inf)
    for row, query in enumerate(queries.double().numpy()):
        for item, label in zip(gallery.double().numpy(), labels.tolist(), strict=True):
            cosine = item @ query / np.linalg.norm(item) / np.linalg.norm(query)
            expected[row, label] = max(expected[row, label], cosine / 0.07)
    np.testing.assert_allclose(fit(gallery, labels, 5, 0)(queries).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("target", range(5))
def test_every_class_has_a_finite_gradient_that_leads_to_it(target: int) -> None:
    gallery, labels, queries = _problem(queries=6)
    head = fit(gallery, labels, 5, 0)
    point = queries.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head(point)[:, target].sum(), point)
    assert gradient.isfinite().all()
    assert (gradient.norm(dim=1) > 0).all()
    with torch.no_grad():
        step = 1e-2 * gradient / gradient.norm(dim=1, keepdim=True)
        assert (head(point + step)[:, target] > head(point)[:, target]).all()


def test_a_query_on_a_gallery_item_and_one_without_direction_have_finite_gradients() -> None:
    gallery, labels, _ = _problem()
    head = fit(gallery, labels, 5, 0)
    point = torch.cat([gallery[:3], torch.zeros(1, 8)]).requires_grad_()
    logits = head(point)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.arange(4)), point)
    assert logits.isfinite().all()
    assert gradient.isfinite().all()


def test_the_length_of_features_does_not_matter() -> None:
    gallery, labels, queries = _problem()
    head, asked = fit(gallery, labels, 5, 0), torch.arange(40) % 5
    stretched = fit(gallery * torch.logspace(-2, 2, 60)[:, None], labels, 5, 0)
    torch.testing.assert_close(stretched(7 * queries), head(queries), atol=1e-4, rtol=1e-4)
    assert torch.equal(stretched.rank(7 * queries, asked).first, head.rank(queries, asked).first)


def test_a_restored_head_ranks_the_same() -> None:
    gallery, labels, queries = _problem()
    head, asked = fit(gallery, labels, 5, 0), torch.arange(40) % 5
    again = restore({name: tensor.clone() for name, tensor in head.state_dict().items()})
    assert isinstance(again, RetrievalHead)
    assert torch.equal(again(queries), head(queries))
    for mine, theirs in zip(again.rank(queries, asked), head.rank(queries, asked), strict=True):
        assert torch.equal(mine, theirs)


def test_the_gallery_is_a_copy() -> None:
    gallery, labels, queries = _problem()
    head = fit(gallery, labels, 5, 0)
    before = head(queries)
    gallery.zero_()
    labels.zero_()
    assert torch.equal(head(queries), before)


def test_every_class_is_in_the_gallery() -> None:
    gallery, labels, _ = _problem()
    with pytest.raises(DataError, match="class index 5 has no training sample"):
        fit(gallery, labels, 6, 0)


class _Means(nn.Module):
    """Features: the mean of every channel in 2 x 2 cells."""

    layers: tuple[str, ...] = ()

    def pooled(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        return []


def _picture(label: int, number: int) -> PIL.Image.Image:
    levels = np.random.default_rng([label, number]).integers(0, 180, (8, 8, 3), dtype=np.uint8)
    levels[..., label] += 60
    return PIL.Image.fromarray(levels)


def _built(name: str, encoder: Encoder, registry: Registry) -> FittedHead:
    items = tuple(Item(id=f"{i}", label=i % 3, load=functools.partial(_picture, i % 3, i)) for i in range(24))
    dataset = Dataset(source="toy:colours", classes=CLASSES, train=items, test=items)
    device = torch.device("cpu")
    loaded = LoadedEncoder(encoder, None)
    return build_head(name, loaded=loaded, dataset=dataset, registry=registry, seed=0, device=device, batch_size=8)


def test_a_saved_head_is_read_back_for_retrieval(tmp_path: Path) -> None:
    registry = Registry()
    for spec in HEADS:
        registry.add_head(spec)
    preprocessing = Preprocessing(input_size=(8, 8))
    encoder = Encoder(source="toy", backbone=_Means(), preprocessing=preprocessing, sha256="a" * 64)
    queries, asked = torch.rand(9, 12, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    head = _built("retrieval", encoder, registry)
    assert (head.task, retrieval.SPEC.task) == ("retrieval", "retrieval")
    assert {"k": 10, "kind": "retrieval"}.items() <= head.settings.items()

    path = tmp_path / "gallery.safetensors"
    save_head(head, path)
    read = read_head(path, name=f"file:{path}", encoder=encoder, registry=registry)
    for again in (read, _built(f"file:{path}", encoder, registry), _built("retrieval", encoder, registry)):
        assert again.task == "retrieval"
        assert again.class_names == CLASSES
        assert torch.equal(again(queries), head(queries))
        for mine, theirs in zip(again.rank(queries, asked), head.rank(queries, asked), strict=True):
            assert torch.equal(mine, theirs)


def test_only_retrieval_ranks() -> None:
    assert [spec.name for spec in HEADS if spec.task == "retrieval"] == ["retrieval"]
