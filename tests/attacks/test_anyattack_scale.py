"""AnyAttack's training in chunks, on rows of a batch, and with everybody's batch norm: the same steps as without."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from robustbench_x.errors import ConfigError
from robustbench_x.fitting.loop import batch_index
from robustbench_x.registry import load_registry
from robustbench_x.testing import toy_victim
from robustbench_x.testing.toys import toy_job
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderHandle, FitView, Meter
from robustbench_x_attacks.anyattack.augment import random_views
from robustbench_x_attacks.anyattack.norm import share_batch_norm

SPEC = load_registry().attacks["anyattack"]
THREAT = ThreatModel(eps=16 / 255)
TINY: dict[str, Any] = {"steps": 5, "batch": 8, "k": 2, "rate": 1e-4}
T = TypeVar("T")


def _view(meter: Meter | None = None, **changes: Any) -> FitView:
    job = toy_job(SPEC, TINY, toy_victim(), THREAT)
    return dataclasses.replace(job.view(meter or Meter()), **changes)


def _train(params: dict[str, Any], view: FitView, steps: int = 4) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    trainer = SPEC.build({**TINY, **params}).trainer(view)
    curve = []
    for number in range(steps):
        terms = trainer.step(number, batch_index(number, batch=8, pool=24, seed=view.seed))
        curve.append({name: float(term) for name, term in terms.items()})
    return curve, trainer.state()


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("params", [{}, {"mode": "compat"}, {"stage": "finetune"}], ids=str)
def test_chunks_change_the_memory_and_not_the_training(params: dict[str, Any], chunk: int) -> None:
    meters = Meter(), Meter()
    whole, state = _train(params, _view(meters[0]))
    parts, same = _train({**params, "chunk": chunk}, _view(meters[1]))
    for a, b in zip(whole, parts, strict=True):
        assert b == pytest.approx(a, rel=0, abs=2e-6)
    assert state.keys() == same.keys()
    for name, moment in state.items():
        if name.startswith("adam.") and name.endswith("exp_avg"):
            torch.testing.assert_close(same[name], moment, rtol=1e-3, atol=1e-7, msg=name)
    assert "decoder.mean" in state
    torch.testing.assert_close(same["decoder.mean"], state["decoder.mean"])
    noisy = 8 * (2 if params.get("stage") != "finetune" else 1) * 4
    assert meters[1].forwards - meters[0].forwards == noisy, "one more look at each noisy image"
    assert meters[1].backwards == meters[0].backwards


def test_a_chunk_as_large_as_the_batch_is_none() -> None:
    meters = Meter(), Meter()
    assert _train({}, _view(meters[0]))[0] == _train({"chunk": 8}, _view(meters[1]))[0]
    assert meters[0].forwards == meters[1].forwards
    with pytest.raises(ConfigError, match="chunk=-1 must be at least 0"):
        SPEC.build({"chunk": -1})


def test_a_random_defence_draws_the_same_for_both_looks_at_a_chunk() -> None:
    seen: list[Tensor] = []

    def jitter(images: Tensor) -> Tensor:
        noise = 0.05 * torch.randn_like(images)
        seen.append(noise)
        return (images + noise).clamp(0, 1)

    handle = EncoderHandle(toy_victim().encoder, jitter, Meter(), stochastic=True)
    _train({"chunk": 4, "k": 1}, _view(encoder=handle), steps=1)
    # The first look is at what the codes are placed by.
    targets, first, second = seen[1:3], seen[3:5], seen[5:]
    assert len(targets) == len(first) == len(second) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_a_part_of_a_batch_has_the_views_of_the_whole() -> None:
    images = torch.rand(6, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    whole = random_views(images, torch.Generator().manual_seed(1), degrees=15)
    rows = torch.tensor([5, 2])
    part = random_views(images[rows], torch.Generator().manual_seed(1), degrees=15, rows=rows, batch=6)
    torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-6)


def test_bfloat16_is_for_the_decoder_too() -> None:
    exact, rounded = _train({}, _view())[0], _train({}, _view(bf16=True))[0]
    assert exact != rounded
    assert rounded[0] == pytest.approx(exact[0], abs=0.05)


# -- batch norm


class _Twins:
    """Two processes that have the same rows: what one gathers is its own, twice."""

    rank, size = 0, 2

    def rows(self, count: int) -> slice:
        return slice(0, count // 2)

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows])

    def average_(self, tensors: Sequence[Tensor]) -> None:
        del tensors

    def told(self, value: T) -> T:
        return value

    def collect(self, value: T) -> list[T]:
        return [value, value]


def test_batch_norm_counts_everybodys_rows() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.BatchNorm1d(12, affine=False))
    shared = copy.deepcopy(plain)
    share_batch_norm(shared, _Twins())
    assert list(shared.state_dict()) == list(plain.state_dict())
    assert not any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in shared.modules())
    rows = 3 * torch.randn(5, 4, 2, 2) + 1
    weights = torch.randn(5, 12)
    for _ in range(3):
        whole, own = plain(torch.cat([rows, rows])), shared(rows)
    torch.testing.assert_close(own, whole[:5], rtol=0, atol=1e-5)
    (whole * torch.cat([weights, weights])).sum().backward()
    (own * weights).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), shared.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(2 * b.grad, a.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, held), other in zip(plain.state_dict().items(), shared.state_dict().values(), strict=True):
        torch.testing.assert_close(other, held, rtol=1e-5, atol=1e-6, msg=name)
    plain.eval(), shared.eval()
    torch.testing.assert_close(shared(rows), plain(rows), rtol=0, atol=1e-5)
