"""Head `lora`: low-rank updates of the encoder's matrices, merged into them after the training."""

import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder
from robustbench_x.errors import SourceError
from robustbench_x.heads.tuning.recipe import Recipe
from robustbench_x.heads.tuning.scheme import Attached, Scheme

__all__ = ["lora", "targets_of"]

_NAME = "default"


def lora(rank: int = 8, alpha: int = 16, recipe: Recipe | None = None) -> Scheme:
    """LoRA (Hu et al. 2022): `W + alpha / rank * B A` with `A` and `B` of rank `rank`; everything else is frozen.

    `A` is drawn as torch draws a layer, `B` starts at zero. By the package peft; merged into plain weights afterwards,
    so the victim is an ordinary network.

    Departures from the paper: every linear layer and every ungrouped convolution of the network is a target, where the
    paper takes the attention's query and value only, so that one rule serves transformers and CNNs; no dropout on the
    update's input. Left out are layers that torch reads past their module (the output of `nn.MultiheadAttention`),
    whose output is not linear in their weight (weight-standardised convolutions), or that peft would imitate wrongly
    (dilated or not zero-padded convolutions).
    """
    return Scheme(
        name="lora",
        recipe=recipe or Recipe(encoder_rate=5e-4),
        attach=lambda copy, generator: _attach(copy, generator, rank, alpha),
        settle=_settle,
        knobs={"rank": rank, "alpha": alpha},
        extra=("peft", "tuning"),
        documentation=inspect.getdoc(lora) or "",
    )


def targets_of(network: nn.Module) -> list[str]:
    """Names of the modules of `network` that get an update: linear layers and ungrouped convolutions."""
    bypassed = {id(child) for m in network.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    return [
        name
        for name, module in network.named_modules()
        if (isinstance(module, nn.Linear) or _is_plain_convolution(module))
        and id(module) not in bypassed
        and _is_linear_in_its_weight(module)
    ]


def _attach(copy: Encoder, generator: torch.Generator, rank: int, alpha: int) -> Attached:
    network = copy.backbone
    targets = targets_of(network)
    if not targets:
        raise SourceError(
            f"{copy.source} has neither linear layers nor ungrouped convolutions that LoRA could update; use head full"
        )
    with warnings.catch_warnings():
        # What peft and the packages behind it warn about is their own business: nothing of it decides a result.
        warnings.simplefilter("ignore")
        from peft import LoraConfig, inject_adapter_in_model

        # A pattern, since peft takes a list of names for endings: `fc` would mean `blocks.0.fc` as well.
        pattern = "|".join(map(re.escape, targets))
        try:
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern), network, _NAME)
        except (TypeError, ValueError) as error:
            raise SourceError(f"{copy.source}: peft cannot update its layers ({error}); use head full") from error
    found = [module for _, _, module in _layers(network)]
    if len(found) != len(targets):
        raise SourceError(f"{copy.source}: peft updates {len(found)} of its {len(targets)} layers; use head full")
    weights: list[nn.Parameter] = []
    for module in found:
        down, up = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
        _draw_(down, generator)
        weights += [down, up]
    return Attached(tuple(weights), targets=len(targets))


def _settle(copy: Encoder) -> None:
    for parent, name, module in list(_layers(copy.backbone)):
        module.merge()
        setattr(parent, name, module.get_base_layer())


def _layers(network: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Every layer with an update: its parent, its name there, itself."""
    from peft.tuners.lora import LoraLayer

    for parent in list(network.modules()):
        for name, module in parent.named_children():
            if isinstance(module, LoraLayer):
                yield parent, name, module


@torch.no_grad()
def _draw_(weight: Tensor, generator: torch.Generator) -> None:
    """As `nn.Linear` and `nn.Conv2d` draw theirs, on the CPU, so that a seed means the same on every device."""
    bound = weight[0].numel() ** -0.5
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


def _is_plain_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether peft's update of it, which knows stride and padding only, is a low-rank change of its weight."""
    if not isinstance(module, nn.Conv2d):
        return False
    return module.groups == 1 and tuple(module.dilation) == (1, 1) and module.padding_mode == "zeros"


@torch.no_grad()
def _is_linear_in_its_weight(module: nn.Linear | nn.Conv2d) -> bool:
    """Whether twice the weight gives twice the output, bias aside: only then can an update be merged."""
    if type(module) in (nn.Linear, nn.Conv2d):
        return True
    generator = torch.Generator().manual_seed(0)
    size = (2, module.in_features) if isinstance(module, nn.Linear) else (2, module.in_channels, *_room(module))
    inputs = torch.randn(size, generator=generator).to(module.weight)
    # Not its own weight: a layer that starts at zero would look linear whatever it does.
    weight = torch.randn(module.weight.shape, generator=generator).to(module.weight)
    try:
        zero, one, two = (torch.func.functional_call(module, {"weight": f * weight}, inputs) for f in (0.0, 1.0, 2.0))
    except (RuntimeError, TypeError, ValueError):
        return False
    size_of_change = float((one - zero).abs().max())
    return size_of_change > 0 and bool(((two - zero) - 2 * (one - zero)).abs().max() <= 1e-3 * size_of_change)


def _room(module: nn.Conv2d) -> list[int]:
    return [2 * side for side in module.kernel_size]
