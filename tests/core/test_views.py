"""Access: what an attack can reach through what it is handed."""

import dataclasses
import gc
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from robustbench_x.errors import BudgetError
from robustbench_x.registry import load_registry
from robustbench_x.testing import ToyVictim, make_view, toy_victim
from robustbench_x.testing.toys import toy_job
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderView, Meter, Query, QueryView, WhiteboxView

THREAT = ThreatModel(eps=8 / 255)


def _reachable(root: object) -> Iterator[object]:
    """Everything reachable from `root` through attributes, items, closures and bound methods.

    Classes and modules are not entered: through them any Python code reaches the whole interpreter, which is
    no matter of what an attack was handed.
    """
    seen: set[int] = set()
    todo: list[object] = [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, BuiltinFunctionType)):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, FunctionType):
            todo += [cell.cell_contents for cell in thing.__closure__ or ()]
            todo += list(thing.__defaults__ or ())
        else:
            todo += gc.get_referents(thing)


def _storages(victim: ToyVictim) -> dict[int, str]:
    named = {f"head.{name}": weight for name, weight in victim.head.named_parameters()}
    return {tensor.untyped_storage().data_ptr(): name for name, tensor in named.items()}


def _found(view: object, victim: ToyVictim) -> list[str]:
    secrets = _storages(victim)
    found = [
        secrets[thing.untyped_storage().data_ptr()]
        for thing in _reachable(view)
        if isinstance(thing, Tensor) and thing.untyped_storage().data_ptr() in secrets
    ]
    held = list(_reachable(view))
    found += ["head" for thing in held if thing is victim.head]
    labels = [t for t in held if isinstance(t, Tensor) and t.dtype == torch.int64 and torch.equal(t, victim.labels)]
    return found + ["labels"] * len(labels)


def test_encoder_access_reaches_neither_head_nor_labels() -> None:
    victim = toy_victim()
    view = make_view("encoder", victim, THREAT)
    assert _found(view, victim) == []
    assert {f.name for f in dataclasses.fields(view)} == {
        "inputs", "threat", "random", "exhaustive", "encoder", "surrogate", "artifact", "partners",
        "targets", "target_texts",
    }  # fmt: skip


def test_a_training_reaches_neither_head_nor_labels() -> None:
    victim = toy_victim()
    view = toy_job(load_registry().attacks["advencoder"], {}, victim, THREAT).view(Meter())
    assert _found(view, victim) == []
    assert {f.name for f in dataclasses.fields(view)} == {
        "encoder", "surrogate", "threat", "seed", "device", "partners", "world", "bf16",
    }  # fmt: skip


def test_the_walk_finds_what_white_box_access_does_hold() -> None:
    victim = toy_victim()
    assert {"head", "labels"} <= set(_found(make_view("whitebox", victim, THREAT), victim))


def test_image_access_reaches_no_model() -> None:
    victim = toy_victim()
    held = list(_reachable(make_view("none", victim, THREAT)))
    assert not [thing for thing in held if isinstance(thing, torch.nn.Module)]


@pytest.mark.parametrize("access", ["scores", "labels"])
def test_a_query_holds_no_model(access: Any) -> None:
    victim = toy_victim()
    view = make_view(access, victim, THREAT)
    held = list(_reachable(view))
    assert not [thing for thing in held if isinstance(thing, torch.nn.Module)]


def test_encoder_access_works_with_a_head_that_raises_when_touched() -> None:
    victim = toy_victim()

    def explode(*_: object) -> None:
        raise AssertionError("the head was touched")

    victim.head.register_forward_pre_hook(explode)
    view = make_view("encoder", victim, THREAT)
    assert isinstance(view, EncoderView)
    assert view.encoder.features(view.inputs).shape == (12, 16)
    assert view.encoder.tokens(view.inputs, ["early"])["early"].spatial.shape == (12, 64, 8)


def test_scores_carry_no_gradient_and_labels_are_classes() -> None:
    victim = toy_victim()
    scores, labels = make_view("scores", victim, THREAT), make_view("labels", victim, THREAT)
    assert isinstance(scores, QueryView)
    assert isinstance(labels, QueryView)
    assert not scores.query(scores.inputs.requires_grad_(True)).requires_grad
    assert torch.equal(labels.query(labels.inputs), victim.labels)


def test_queries_are_counted_and_capped() -> None:
    victim, meter = toy_victim(), Meter()
    query = Query(victim.logits, meter, answer="labels", cap=20)
    query(victim.images)
    assert (meter.forwards, query.remaining) == (12, 8)
    with pytest.raises(BudgetError, match="cap of 20 images is spent"):
        query(victim.images)
    query.close()


def test_forwards_and_backwards_are_counted_per_image() -> None:
    meter = Meter()
    view = make_view("whitebox", toy_victim(), THREAT, meter=meter)
    assert isinstance(view, WhiteboxView)
    pixels = view.inputs.requires_grad_(True)
    torch.autograd.grad(view.model(pixels).sum(), pixels)
    with torch.no_grad():
        view.model(pixels[:5])
    assert (meter.forwards, meter.backwards) == (17, 12)


def test_bf16_views_return_float32() -> None:
    from robustbench_x.views import ModelHandle

    victim = toy_victim()
    logits = ModelHandle(victim.logits, Meter(), bf16=True)(victim.images)
    exact = victim.logits(victim.images)
    assert logits.dtype == torch.float32
    assert 0 < float((logits - exact).abs().max()) < 0.2 * float(exact.abs().max())
