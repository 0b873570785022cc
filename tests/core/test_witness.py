"""The witness: what it saw of each sample, whatever order, part or size the attack asked about."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from robustbench_x.randomness import SampleRandom
from robustbench_x.testing import toy_victim
from robustbench_x.threat import ThreatModel
from robustbench_x.views import Meter, ModelHandle, Query
from robustbench_x.witness import Witness

TOY = toy_victim()
COUNT = len(TOY.images)
LINF = ThreatModel(eps=8 / 255)
THREATS = [LINF, ThreatModel(norm="l2", eps=0.5), ThreatModel(norm="patch", eps=0.1)]


def _noise(threat: ThreatModel) -> Tensor:
    return threat.noise(TOY.images, SampleRandom(range(COUNT)))


def _answers(labels: Tensor, margins: float | Sequence[float] = 1.0) -> Tensor:
    """Logits in which the other classes lead by `margins`; by a negative one the label leads."""
    lead = torch.as_tensor(margins, dtype=torch.float32).expand(len(labels))
    return lead[:, None].repeat(1, TOY.head.num_classes).scatter(1, labels[:, None], 0.0)


def _witness(threat: ThreatModel = LINF) -> Witness:
    return Witness(TOY.images, TOY.labels, threat)


def _only(*samples: int) -> list[bool]:
    return [i in samples for i in range(COUNT)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_fooled_answer_inside_the_budget_is_seen(threat: ThreatModel) -> None:
    witness, images = _witness(threat), _noise(threat)
    witness.look(images[3:5], _answers(TOY.labels[3:5]))
    witness.look(images, _answers(TOY.labels, -1.0))
    assert witness.testify().fooled == _only(3, 4)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_an_answer_outside_the_budget_is_no_success(threat: ThreatModel) -> None:
    witness = _witness(threat)
    larger = ThreatModel(norm=threat.norm, eps=1.5 * threat.eps)
    outside = _noise(larger)
    assert (threat.overrun(outside, TOY.images) > 1e-3).all()
    witness.look(outside, _answers(TOY.labels))
    witness.look(TOY.images - 1, _answers(TOY.labels))  # outside [0, 1]
    assert witness.testify().fooled == _only()


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_answers_find_their_samples_in_any_order_and_part(threat: ThreatModel) -> None:
    images, order = _noise(threat), torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    fooled = {2, 7, 11}
    witness = _witness(threat)
    for part in (order[:5], order[5:10], order[10:]):
        lead = [1.0 if int(i) in fooled else -1.0 for i in part]
        witness.look(images[part], _answers(TOY.labels[part], lead))
    assert witness.testify().fooled == _only(*fooled)
    twice = torch.tensor([4, 4, 4, 9])
    witness.look(images[twice], _answers(TOY.labels[twice], [-1.0, 1.0, -1.0, -1.0]))
    assert witness.testify().fooled == _only(*fooled, 4), "several looks at one sample in one batch"


@pytest.mark.parametrize("lead", [0.0, 0.04, math.nan, -math.inf])
def test_a_hair_is_no_success(lead: float) -> None:
    """The judge sees the image in another batch, and answers differ by rounding."""
    witness = _witness()
    witness.look(TOY.images, _answers(TOY.labels, lead))
    assert witness.testify().fooled == _only()


def test_what_is_no_image_of_this_size_is_not_noted() -> None:
    witness = _witness()
    witness.look(TOY.images[:, :, :8, :8], _answers(TOY.labels))
    witness.look(TOY.images[:, :1], _answers(TOY.labels))
    witness.look(TOY.images, torch.zeros(COUNT, 1))
    seen = witness.testify()
    assert seen.fooled == _only()
    assert all(map(math.isnan, seen.late_gain))


def test_images_that_are_not_finite_are_no_success() -> None:
    witness = _witness()
    witness.look(TOY.images * torch.nan, _answers(TOY.labels))
    witness.look(TOY.images / 0, _answers(TOY.labels))
    assert witness.testify().fooled == _only()


@pytest.mark.parametrize(
    ("path", "late"),
    [
        ([float(i) for i in range(20)], 10 / 19),
        ([float(i) for i in range(19)], math.nan),
        ([0.0, *[4.0] * 25], 0.0),
        ([0.0, *[3.0] * 20, *[4.0] * 10], 0.25),
        ([0.0, 5.0, *[1.0] * 20], 0.0),
        ([2.0] * 30, 0.0),
        ([5.0, *[1.0] * 30], 0.0),
    ],
)
def test_the_late_gain_of_known_walks(path: list[float], late: float) -> None:
    witness = _witness()
    for value in path:
        witness.look(TOY.images[:1], _answers(TOY.labels[:1], value - 100))
    seen = witness.testify().late_gain
    assert seen[0] == pytest.approx(late, nan_ok=True)
    assert all(map(math.isnan, seen[1:]))


def test_looks_outside_the_budget_are_no_part_of_the_walk() -> None:
    witness = _witness()
    for value in range(40):
        witness.look(TOY.images[:1] + (0 if value < 19 else 0.5), _answers(TOY.labels[:1], float(value)))
    assert math.isnan(witness.testify().late_gain[0])


def test_it_watches_a_model_and_leaves_its_answers_and_gradients_as_they_are() -> None:
    witness = _witness(ThreatModel(eps=0.2))
    handle = ModelHandle(TOY.logits, Meter(), watch=witness.look)
    walk = TOY.images.clone()
    for _ in range(10):
        pixels = walk.requires_grad_(True)
        logits = handle(pixels)
        assert torch.equal(logits, TOY.logits(pixels))
        loss = torch.nn.functional.cross_entropy(logits, TOY.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
        walk = (pixels + 0.02 * gradient.sign()).clamp(0, 1).detach()
    with torch.no_grad():
        last = handle(walk)
    lost = last.argmax(dim=1) != TOY.labels
    assert lost.any()
    seen = torch.tensor(witness.testify().fooled)
    assert (seen | ~lost).all(), "all that fell at the last look was seen to fall"


@pytest.mark.parametrize("answer", ["scores", "labels"])
def test_it_watches_questions_whatever_is_answered(answer: str) -> None:
    witness = _witness()
    wrong = _answers(TOY.labels)
    query = Query(lambda images: wrong[: len(images)], Meter(), answer=answer, cap=None, watch=witness.look)  # type: ignore[arg-type]
    query(TOY.images[:6])
    query.close()
    assert witness.testify().fooled == _only(*range(6))
