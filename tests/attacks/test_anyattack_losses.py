"""AnyAttack's losses and schedules against plain re-implementations and the published values."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from robustbench_x_attacks.anyattack.losses import (
    alignment,
    bidirectional,
    info_nce,
    learning_rate_at,
    temperature_at,
)


def _rows(seed: int) -> Tensor:
    return 3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum()) / math.sqrt(float((a * a).sum()) * float((b * b).sum()))


def _nce(query: Tensor, keys: Tensor, temperature: float) -> float:
    total = 0.0
    for i in range(5):
        chances = [math.exp(_cosine(query[i], keys[j]) / temperature) for j in range(5)]
        total -= math.log(chances[i] / sum(chances)) / 5
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_info_nce_is_the_written_out_loop(temperature: float) -> None:
    query, keys = _rows(0), _rows(1)
    assert float(info_nce(query, keys, temperature)) == pytest.approx(_nce(query, keys, temperature))
    assert float(info_nce(query, keys, temperature)) != pytest.approx(_nce(keys, query, temperature))


def test_bidirectional_is_the_mean_of_both_directions_at_the_published_temperature() -> None:
    adversarial, targets = _rows(0), _rows(1)
    expected = (_nce(adversarial, targets, 0.07) + _nce(targets, adversarial, 0.07)) / 2
    assert float(bidirectional(adversarial, targets)) == pytest.approx(expected)


def test_alignment_is_minus_the_mean_cosine() -> None:
    adversarial, targets = _rows(0), _rows(1)
    expected = -sum(_cosine(adversarial[i], targets[i]) for i in range(5)) / 5
    assert float(alignment(adversarial, targets)) == pytest.approx(expected)


def test_every_loss_falls_towards_the_targets_and_ignores_length() -> None:
    targets, far = _rows(1), _rows(0)
    measures: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda rows: info_nce(targets, rows, 0.5),
        lambda rows: bidirectional(rows, targets),
        lambda rows: alignment(rows, targets),
    )
    for loss in measures:
        assert float(loss(targets + 0.1 * far)) < float(loss(targets + far)) < float(loss(far - targets))
        assert float(loss(9 * far)) == pytest.approx(float(loss(far)))


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 1.0), (2_500, 0.514), (5_000, 0.265), (7_500, 0.136), (10_000, 0.07), (10_001, 0.07), (520_000, 0.07)],
)
def test_the_temperature_has_the_published_values(step: int, value: float) -> None:
    assert temperature_at(step) == pytest.approx(value, abs=5e-4)
    assert temperature_at(step) == pytest.approx(max(math.exp(-2.6593e-4 * step), 0.07), rel=1e-3)


def test_the_code_s_temperature_lags_a_step_and_jumps_back_in_every_epoch() -> None:
    values = [temperature_at(step, steps=100, epoch=30) for step in range(64)]
    falling = [temperature_at(step, steps=100) for step in range(30)]
    assert values == [1.0, *falling, *falling, *falling[:3]]


def test_the_code_s_temperature_stays_at_its_end_within_a_long_epoch() -> None:
    assert temperature_at(25_000, epoch=30_000) == pytest.approx(0.07)
    assert temperature_at(30_000, epoch=30_000) == pytest.approx(0.07), "set by the last batch of the epoch before"
    assert temperature_at(30_001, epoch=30_000) == 1.0


def test_the_learning_rate_is_torch_s_cosine_with_warm_restarts() -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-4)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7)
    steps: Any = optimizer.step
    for step in range(20):
        assert learning_rate_at(step, rate=1e-4, restart=7) == pytest.approx(optimizer.param_groups[0]["lr"])
        steps()
        schedule.step()
