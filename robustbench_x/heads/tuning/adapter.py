"""Head `adapter`: a small residual bottleneck after every layer that the encoder names."""

import inspect
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.encoders.encoder import Encoder
from robustbench_x.errors import SourceError
from robustbench_x.heads.tuning.recipe import Recipe
from robustbench_x.heads.tuning.scheme import Attached, Scheme

__all__ = ["Adapted", "adapter"]


def adapter(reduction: int = 8, recipe: Recipe | None = None) -> Scheme:
    """Adapters (Houlsby et al. 2019): a bottleneck `x + U gelu(D x)` after a layer; everything else is frozen.

    `D` maps to the layer's channels over `reduction` (at least 4), `U` back. `U` starts at zero, so training starts
    from the public features. Tokens, NCHW maps (CNNs) and NHWC maps (Swin) are adapted along their channels.

    Departures from the paper: one adapter after every layer that the encoder names, where the paper puts two inside
    each transformer block, after attention and after the MLP, so that one rule serves transformers and CNNs; layer
    norms stay frozen.
    """
    return Scheme(
        name="adapter",
        recipe=recipe or Recipe(encoder_rate=1e-3),
        attach=_attach,
        shape=lambda copy: _shape(copy, reduction),
        knobs={"reduction": reduction},
        documentation=inspect.getdoc(adapter) or "",
    )


@final
class Adapted(nn.Module):
    """A layer with its adapter; to the network around it, the layer itself.

    Args:
        inner: The layer; its output is one tensor.
        channels: Of that output.
        width: Of the bottleneck.
        axis: Where the channels are: 1 (NCHW) or -1 (tokens, NHWC, rows).
    """

    def __init__(self, inner: nn.Module, *, channels: int, width: int, axis: int) -> None:
        super().__init__()
        self.inner = inner
        self.axis = axis
        # By way of meta: the weights come from the scheme's own generator or from a file, never from the global one.
        self.down = nn.Linear(channels, width, device="meta").to_empty(device="cpu")
        self.up = nn.Linear(width, channels, device="meta").to_empty(device="cpu")
        for weight in (*self.down.parameters(), *self.up.parameters()):
            nn.init.zeros_(weight)
        self.requires_grad_(False).train(inner.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, adapted."""
        output: Tensor = self.inner(*args, **kwargs)
        channels_last = output.movedim(self.axis, -1)
        change: Tensor = self.up(F.gelu(self.down(channels_last)))
        return output + change.movedim(-1, self.axis)

    def __getattr__(self, name: str) -> Any:
        # What the network around the layer reads of it (a stride, a child by its path) is still found.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def _shape(copy: Encoder, reduction: int) -> None:
    paths = _paths(copy)
    found = _outputs(copy, paths)
    for layer, path in paths.items():
        channels, axis = found[layer]
        parent, _, name = path.rpartition(".")
        inner = copy.backbone.get_submodule(path)
        width = max(4, channels // reduction)
        adapted = Adapted(inner, channels=channels, width=width, axis=axis).to(copy.mean.device)
        setattr(copy.backbone.get_submodule(parent), name, adapted)


def _attach(copy: Encoder, generator: torch.Generator) -> Attached:
    weights: list[nn.Parameter] = []
    places = [module for module in copy.backbone.modules() if isinstance(module, Adapted)]
    for place in places:
        # Drawn on the CPU, so that a seed means the same weights on every device. The bound is nn.Linear's.
        bound = place.down.in_features**-0.5
        drawn = torch.empty(place.down.weight.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            place.down.weight.copy_(drawn)
        weights += [*place.down.parameters(), *place.up.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    return Attached(tuple(weights), targets=len(places))


def _paths(copy: Encoder) -> dict[str, str]:
    """Each named layer to the path of its module in the backbone; a wrapper may put names of its own in front."""
    if not copy.layers:
        raise SourceError(f"{copy.source} names no layers, so there is no place for adapters; use head lora or full")
    known = [name for name, _ in copy.backbone.named_modules()]
    paths: dict[str, str] = {}
    for layer in copy.layers:
        fitting = sorted((n for n in known if n == layer or n.endswith(f".{layer}")), key=lambda n: n.count("."))
        if not fitting:
            raise SourceError(
                f"{copy.source}: its layer {layer} is no module that an adapter could follow; use head lora or full"
            )
        paths[layer] = fitting[0]
    for outer in paths.values():
        inside = [layer for layer, path in paths.items() if path.startswith(f"{outer}.")]
        if inside:
            raise SourceError(
                f"{copy.source}: its layer {inside[0]} lies inside another one, {outer}, so adapters would nest; use "
                "head lora or full"
            )
    return paths


@torch.no_grad()
def _outputs(copy: Encoder, paths: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Channels and channel axis of every layer's output: the arrangement that agrees with the layer's tokens."""
    outputs: dict[str, object] = {}
    hooks = [
        copy.backbone.get_submodule(path).register_forward_hook(
            lambda _module, _args, output, layer=layer: outputs.update({layer: output})
        )
        for layer, path in paths.items()
    ]
    images = torch.rand((2, 3, *copy.input_size), generator=torch.Generator().manual_seed(0))
    try:
        tokens = copy.tokens(images.to(copy.mean.device), list(paths))
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for layer in paths:
        axis = _channel_axis(outputs.get(layer), tokens[layer].spatial)
        if axis is None:
            raise SourceError(
                f"{copy.source}: the output of its layer {layer} is not arranged as tokens, NCHW or NHWC, so no "
                "adapter can follow it; use head lora or full"
            )
        found[layer] = (tokens[layer].spatial.shape[2], axis)
    return found


def _channel_axis(output: object, spatial: Tensor) -> int | None:
    """Where the channels of `output` are, given the same as tokens `(N, T, D)`; None when it is not those tokens."""
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4:
        views = {1: output.flatten(2).transpose(1, 2), -1: output.flatten(1, 2)}
    elif output.ndim in (2, 3):
        rows = output if output.ndim == 3 else output.unsqueeze(1)
        views = {-1: rows[:, -spatial.shape[1] :]}  # class and register tokens come first
    else:
        return None
    fits = [a for a, view in views.items() if view.shape == spatial.shape and torch.allclose(view.float(), spatial)]
    return fits[0] if fits else None
