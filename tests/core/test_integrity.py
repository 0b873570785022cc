"""The seal: every way of changing a module that matters is seen, and undone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_x.integrity import Seal, modules_within


class _Net(nn.Module):
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.cache: Tensor | None = None
        self.calls = 0
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.tied = self.body[0]
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.cache, self.calls = images, self.calls + 1
        out: Tensor = self.scale * self.body(images) + self.shift
        return out


def _net() -> _Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _Net()
    return net.eval().requires_grad_(False)


def _swap(net: Any) -> None:
    weight = net.body[0].weight.data
    weight.copy_(weight.flip(0).clone())


def _nan(net: Any) -> None:
    net.body[0].weight.data[0] = torch.nan


def _storage(net: Any) -> None:
    net.body[0].weight.data = torch.zeros(4, 3, 3, 3)


def _other_shape(net: Any) -> None:
    net.body[0].weight.data = torch.zeros(1)


def _replace(net: Any) -> None:
    net.body[0] = nn.Conv2d(3, 4, 3).eval().requires_grad_(False)


def _add(net: Any) -> None:
    net.extra = nn.Linear(1, 1)


def _remove(net: Any) -> None:
    del net.body[1]


def _buffer(net: Any) -> None:
    net.shift.add_(1)


def _counter(net: Any) -> None:
    net.body[1].num_batches_tracked.add_(1)


def _train(net: Any) -> None:
    net.body[1].train()


def _scale(net: Any) -> None:
    net.scale = 0.0


def _forward(net: Any) -> None:
    net.forward = lambda images: images


def _hook(net: Any) -> None:
    net.body[0].register_forward_hook(lambda *_: None)


def _pre_hook(net: Any) -> None:
    net.register_forward_pre_hook(lambda *_: None)


def _backward_hook(net: Any) -> None:
    net.register_full_backward_hook(lambda *_: None)


def _global_hook(net: Any) -> None:
    nn.modules.module.register_module_forward_pre_hook(lambda *_: None)


def _grad(net: Any) -> None:
    net.body[0].weight.grad = torch.zeros(4, 3, 3, 3)


def _requires_grad(net: Any) -> None:
    net.requires_grad_(True)


CHANGES: tuple[Callable[[Any], None], ...] = (
    _swap,
    _nan,
    _storage,
    _other_shape,
    _replace,
    _add,
    _remove,
    _buffer,
    _counter,
    _train,
    _scale,
    _forward,
    _hook,
    _pre_hook,
    _backward_hook,
    _global_hook,
    _grad,
    _requires_grad,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_is_seen_and_undone(change: Callable[[Any], None]) -> None:
    net, images = _net(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    conv: Any = net.body[0]
    conv.register_forward_hook(lambda *_: None)  # one that belongs there
    before, seal = net(images), Seal(net)
    assert seal.broken() is None
    change(net)
    try:
        assert "the attack" in str(seal.broken())
    finally:
        seal.restore()
    assert seal.broken() is None
    assert torch.equal(net(images), before)
    assert len(conv._forward_hooks) == 1
    assert net.tied is net.body[0] is conv


def test_a_hook_exchanged_for_another_is_seen() -> None:
    net = _net()
    handle = net.register_forward_hook(lambda *_: None)
    seal = Seal(net)
    handle.remove()
    net.register_forward_hook(lambda *_: torch.zeros(1))
    assert seal.broken() is not None


def test_a_forward_pass_that_fills_caches_is_no_change() -> None:
    net = _net()
    seal = Seal(net)
    net(torch.rand(1, 3, 8, 8))
    assert seal.broken() is None


def test_every_module_is_sealed() -> None:
    one, two = _net(), _net()
    seal = Seal(one, two)
    two.shift.add_(1)
    assert seal.broken() == "the attack changed the victim's weights or buffers"


def test_modules_inside_defences_are_found() -> None:
    class Holds:
        """A defence with a network."""

        def __init__(self) -> None:
            self.net = _net()
            self.quality = 3

    held = Holds()
    assert modules_within(held, object()) == [held.net]
