"""Proof that an attack left the victim as it found it, and the means to restore it when not."""

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["Seal", "modules_within"]

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


@final
class Seal:
    """Remembers modules: their tensors, modes, hooks and attributes, and torch's process-wide hooks.

    Args:
        modules: What must not change; all of it is already frozen and in eval mode.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._parts = list({id(part): part for module in modules for part in module.modules()}.values())
        self._attributes: list[tuple[nn.Module, _Kept]] = [(part, _attributes(part)) for part in self._parts]
        self._global_hooks = {name: dict(getattr(torch_module, name)) for name in _GLOBAL_HOOKS}
        tensors = {id(t): t for part in self._parts for t in _tensors(part)}
        for tensor in tensors.values():
            tensor.grad = None  # what training left behind is no attack's doing
        self._tensors = [(t, t.detach(), t.detach().cpu().clone(), t.requires_grad) for t in tensors.values()]
        self._prints = [_fingerprint(t) for t, *_ in self._tensors]

    def broken(self) -> str | None:
        """What was changed since the seal was set, in words; None when nothing was."""
        hooks = {name: dict(getattr(torch_module, name)) for name in _GLOBAL_HOOKS}
        if hooks != self._global_hooks or any(not _same(_attributes(p), kept) for p, kept in self._attributes):
            return "the attack changed the victim's modes, modules, methods or hooks"
        if any(t.requires_grad != wanted or t.grad is not None for t, _, _, wanted in self._tensors):
            return "the attack left gradients on the victim's weights"
        if [_fingerprint(t) for t, *_ in self._tensors] != self._prints:
            return "the attack changed the victim's weights or buffers"
        return None

    @torch.no_grad()
    def restore(self) -> None:
        """Puts tensors, modes, modules, attributes, hooks and gradients back."""
        for name, hooks in self._global_hooks.items():
            _refill(getattr(torch_module, name), hooks)
        for part, kept in self._attributes:
            for name in set(_attributes(part)) - set(kept):
                vars(part).pop(name)
            for name, (value, content) in kept.items():
                if content is not None:
                    _refill(value, content)
                vars(part)[name] = value
        for tensor, storage, copy, wanted in self._tensors:
            storage.copy_(copy)
            tensor.data = storage
            tensor.grad = None
            tensor.requires_grad_(wanted)


def modules_within(*owners: object) -> list[nn.Module]:
    """The torch modules that objects (defences) are or hold as attributes."""
    held: Iterable[object] = (value for owner in owners for value in (owner, *getattr(owner, "__dict__", {}).values()))
    return [value for value in held if isinstance(value, nn.Module)]


_Kept = dict[str, tuple[Any, dict[Any, Any] | None]]
_TORCH_DICTS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
"""Where a module keeps its weights, buffers, submodules and hooks."""


def _attributes(part: nn.Module) -> _Kept:
    """What decides a module's answer: torch's dicts with their content, and attributes that are switches or code.

    Other attributes may be caches that a forward pass fills, so they are nobody's fault.
    """
    kept: _Kept = {name: (vars(part)[name], dict(vars(part)[name])) for name in _TORCH_DICTS}
    for name, value in vars(part).items():
        if name not in kept and (isinstance(value, bool | float | str) or callable(value)):
            kept[name] = (value, None)
    return kept


def _same(now: _Kept, kept: _Kept) -> bool:
    if now.keys() != kept.keys():
        return False
    for name, (value, content) in now.items():
        old, old_content = kept[name]
        if value is not old and not (isinstance(value, bool | float | str) and value == old):
            return False
        # Items by identity: comparing tensors by value is the fingerprint's work.
        if content is not None and old_content is not None:
            if content.keys() != old_content.keys():
                return False
            if any(content[key] is not old_content[key] for key in content):
                return False
    return True


def _refill(held: Any, content: dict[Any, Any]) -> None:
    held.clear()
    held.update(content)


def _tensors(part: nn.Module) -> list[Tensor]:
    return [t for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]


@torch.no_grad()
def _fingerprint(tensor: Tensor) -> str:
    # Three sums in float64, one of them weighted by position: any write that matters, a swap too, moves one of
    # them, at a hundredth of a pass. As text, so that a NaN weight equals itself.
    values = tensor.detach().reshape(-1).to(torch.float64 if tensor.device.type != "mps" else torch.float32)
    ramp = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype)
    return f"{tuple(tensor.shape)} {float(values.sum())!r} {float(values.square().sum())!r} {float(values @ ramp)!r}"
