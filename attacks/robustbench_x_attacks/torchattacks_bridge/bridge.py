"""Runs one torchattacks attack on a view, contained: no trace on global state, weights or stdout."""

import contextlib
import importlib
import math
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from robustbench_x.encoders.encoder import check_range
from robustbench_x.errors import AttackError
from robustbench_x.views import ImageView, QueryView, View, WhiteboxView
from robustbench_x_attacks.torchattacks_bridge.adapter import Adapter
from robustbench_x_attacks.torchattacks_bridge.entry import Entry

__all__ = ["Bridge"]

_NORM_NAMES = {"linf": "Linf", "l2": "L2"}
_MOST_CLASSES = 10
"""APGDT, FAB and AutoAttack aim at one class less: the 9 likeliest wrong ones, not 999 of them."""
_CHUNK = 64
"""Images per query at least, where torchattacks asks about many copies of the batch at once."""
_INSET = 1e-6
"""How far from 0 and 1 CW's pixels start; tanh is so flat there that a binary image needs some 300 steps to move."""


class Bridge:
    """Base of every attack here; a subclass adds the entry and its parameters as dataclass fields."""

    entry: ClassVar[Entry]
    family: ClassVar[str] = "torchattacks"

    def __post_init__(self) -> None:
        for knob in self.entry.all_knobs:
            knob.check(getattr(self, knob.name))

    def run(self, view: View) -> Tensor:
        """Candidate images, with NaN left in where torchattacks produced it.

        Raises:
            AttackError: The norm, the image shape or the number of classes is one it cannot run with.
            RangeError: The inputs are not in [0, 1]; torchattacks would clip them silently.
        """
        inputs = view.inputs
        if not len(inputs) or view.threat.eps == 0:
            return inputs.clone()
        check_range(inputs)
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        _refuse(self.entry, values, view, f"{self.family}:{self.entry.name}")
        with _contained(view):
            # A clone made out here is an ordinary tensor even where the view was built under inference mode.
            clean = inputs.clone().detach().float()
            images = _run(self.entry, values, view, clean)
        return images.detach().float()


def _run(entry: Entry, values: Mapping[str, Any], view: View, clean: Tensor) -> Tensor:
    if isinstance(view, ImageView):
        images: Tensor = _attack(entry, values, view, _adapter(entry, view), clean)(clean)
        return images
    assert isinstance(view, WhiteboxView | QueryView)
    labels = view.labels.clone().long()
    if entry.each:
        rows = range(len(clean))
        return torch.cat([_run_one(entry, values, view, clean[i : i + 1], labels[i : i + 1]) for i in rows])
    adapter = _adapter(entry, view)
    attack = _attack(entry, values, view, adapter, clean)
    if values.get("target", "none") != "none":
        labels = _aim(entry, attack, adapter, clean, labels, values["target"])
    if not entry.insets:
        result: Tensor = attack(clean, labels)
        return result
    inset = clean.clamp(_INSET, 1 - _INSET)
    result = attack(inset, labels)
    return torch.where(result == inset, clean, result)


def _run_one(entry: Entry, values: Mapping[str, Any], view: View, image: Tensor, label: Tensor) -> Tensor:
    """One image on its likeliest classes and its own, as DeepFool's authors do: each class costs a gradient."""
    clean_logits = _adapter(entry, view)(image)[0].detach()
    clean_logits[label] = torch.inf
    columns = clean_logits.topk(min(values["classes"], len(clean_logits))).indices.sort().values
    adapter = _adapter(entry, view, columns=columns)
    result: Tensor = _attack(entry, values, view, adapter, image)(image, (columns == label).nonzero()[0])
    return result


def _adapter(entry: Entry, view: View, columns: Tensor | None = None) -> Adapter:
    device = view.inputs.device
    if isinstance(view, WhiteboxView):
        return Adapter(
            view.model,
            device=device,
            num_classes=view.num_classes,
            gradients=True,
            clamps=entry.clamps,
            lifts=entry.lifts,
            columns=columns,
        )
    if isinstance(view, QueryView):
        # SPSA asks about `max_batch_size` copies of the whole batch at once.
        chunk = max(len(view.inputs), _CHUNK)
        return Adapter(
            view.query,
            device=device,
            num_classes=view.num_classes,
            gradients=False,
            clamps=entry.clamps,
            chunk=chunk,
        )
    return Adapter(_no_model, device=device, num_classes=0, gradients=False)


def _no_model(images: Tensor) -> Tensor:
    raise AttackError("this attack has no access to a model")


def _attack(entry: Entry, values: Mapping[str, Any], view: View, adapter: Adapter, clean: Tensor) -> Any:
    """A fresh torchattacks object: an exception in an earlier batch leaves the old one in a wrong state."""
    arguments = entry.arguments(values)
    eps = view.threat.eps
    if "alpha" in arguments and arguments["alpha"] is None:
        arguments["alpha"] = entry.step_factor * eps / values.get("steps", 1)
    if entry.eps:
        arguments[entry.eps] = eps
    if entry.eps == "std" and view.threat.norm == "l2":
        arguments["std"] = eps / math.sqrt(clean[0].numel())
    if entry.dual:
        arguments["norm"] = _NORM_NAMES[view.threat.norm]
    if entry.seeded:
        arguments["seed"] = view.random.seed
    if entry.counts_classes and isinstance(view, WhiteboxView):
        arguments["n_classes"] = min(view.num_classes, _MOST_CLASSES)
    if "n_queries" in arguments and isinstance(view, QueryView) and view.query.remaining is not None:
        # Besides its queries a restart asks about the start and the result, and the attack once about the clean image.
        share = view.query.remaining // (len(clean) * arguments["n_restarts"]) - 3
        arguments["n_queries"] = max(1, min(arguments["n_queries"], share))
    attack = getattr(importlib.import_module("torchattacks"), entry.name)(adapter, **arguments)
    for part in getattr(getattr(attack, "_autoattack", None), "attacks", ()):
        if hasattr(part, "n_queries"):
            part.n_queries = values["queries"]
        else:
            part.steps = values["steps"]
    return attack


def _aim(entry: Entry, attack: Any, adapter: Adapter, clean: Tensor, labels: Tensor, target: str) -> Tensor:
    """Sets the target class; returns what to pass as labels.

    JSMA's own choice is (label + 1) modulo 10 whatever the number of classes, so it is given its target too.
    """
    with torch.no_grad():
        logits: Tensor = adapter(clean)
    if target == "next":
        targets = (labels + 1) % logits.shape[1]
    else:
        targets = logits.scatter(1, labels[:, None], torch.inf).argmin(dim=1)
    if entry.targets == "label":
        attack.set_mode_targeted_by_label(quiet=True)
        return targets
    attack.set_mode_targeted_by_function(lambda images, labels: targets, quiet=True)
    return labels


def _refuse(entry: Entry, values: Mapping[str, Any], view: View, name: str) -> None:
    if view.threat.norm not in entry.norms:
        raise AttackError(f"{name} runs with {' or '.join(entry.norms)}, not with {view.threat.norm}")
    height, width = view.inputs.shape[-2:]
    if entry.square and height != width:
        raise AttackError(f"{name} needs square images, got {height}x{width}: {entry.square}")
    count = view.inputs[0].numel()
    if entry.max_values is not None and count > entry.max_values:
        raise AttackError(
            f"{name} needs memory quadratic in the {count} pixel values of an image; it is run up to "
            f"{entry.max_values}: use torchattacks:EADL1 or torchattacks:SparseFool"
        )
    needed, instead = entry.min_classes, entry.instead
    if values.get("loss") == "dlr":
        needed, instead = 3, f"{name} with loss=ce"
    if isinstance(view, WhiteboxView | QueryView) and view.num_classes < needed:
        raise AttackError(f"{name} needs {needed} classes, the head has {view.num_classes}: use {instead}")


@contextlib.contextmanager
def _contained(view: View) -> Iterator[None]:
    """Gradients on, autocast off, every global generator seeded from the view and restored, prints to stderr."""
    device = view.inputs.device
    devices = [device] if device.type == "cuda" else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with (
        torch.inference_mode(False),  # which also undoes no_grad
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=devices),
        contextlib.redirect_stdout(sys.stderr),
        warnings.catch_warnings(),
    ):
        # SparseFool hands a tensor to numpy.unravel_index, which numpy 2 warns about.
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
        torch.manual_seed(view.random.seed)
        np.random.seed(view.random.seed % 2**32)
        random.seed(view.random.seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
