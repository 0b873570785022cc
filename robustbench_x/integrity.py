"""Proof that an attack left the victim as it found it, and the means to restore it when not."""

import hashlib
from typing import Any, final

import torch
from torch import nn

__all__ = ["Seal"]


@final
class Seal:
    """Remembers a module's weights, buffers, modes and hooks.

    Args:
        modules: What must not change; all of it is already frozen and in eval mode.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self._copies = [{k: v.detach().cpu().clone() for k, v in _tensors(m).items()} for m in modules]
        self._hooks = [
            (registry, dict(registry)) for m in modules for part in m.modules() for registry in _hook_registries(part)
        ]
        self._print = self._fingerprint()
        self._shape = self._structure()

    def broken(self) -> str | None:
        """What was changed since the seal was set, in words; None when nothing was."""
        if self._structure() != self._shape:
            return "the attack changed the victim's modes, gradients or hooks"
        if self._fingerprint() != self._print:
            return "the attack changed the victim's weights or buffers"
        return None

    @torch.no_grad()
    def restore(self) -> None:
        """Puts weights, buffers, modes and gradients back; foreign hooks are removed."""
        for module, copies in zip(self._modules, self._copies, strict=True):
            for name, tensor in _tensors(module).items():
                tensor.copy_(copies[name])
            module.eval().requires_grad_(False)
            for weight in module.parameters():
                weight.grad = None
        for registry, original in self._hooks:
            registry.clear()
            registry.update(original)

    @torch.no_grad()
    def _fingerprint(self) -> list[str]:
        # Two sums per tensor in float64: any write that matters moves one of them, at a hundredth of a pass.
        # As text, so that a NaN weight equals itself.
        prints = []
        for module in self._modules:
            for tensor in _tensors(module).values():
                values = tensor.detach().double()
                prints.append(f"{float(values.sum())!r} {float(values.square().sum())!r}")
        return prints

    def _structure(self) -> str:
        digest = hashlib.sha256()
        for module in self._modules:
            for name, part in module.named_modules():
                hooks = sum(len(registry) for registry in _hook_registries(part))
                digest.update(f"{name}:{type(part).__name__}:{part.training}:{hooks};".encode())
            for name, weight in module.named_parameters():
                digest.update(f"{name}:{weight.requires_grad}:{weight.grad is None};".encode())
        return digest.hexdigest()


def _hook_registries(module: nn.Module) -> list[dict[int, Any]]:
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
