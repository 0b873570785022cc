"""Backbones whose layers are read with forward hooks: networks that are not timm's."""

from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor, nn

from robustbench_x.encoders.encoder import Tokens

__all__ = ["HookedBackbone"]


class _ReachedError(Exception):
    """Ends a forward pass once the deepest wanted layer has run."""


@final
class HookedBackbone(nn.Module):
    """An image tower and its layers.

    Args:
        tower: The network.
        pooled: Features `(N, D)` of `(tower, normalised images)`. It must hold no module itself, so that a deep copy
            of this backbone runs on its own weights.
        blocks: Names of its layers among the submodules of `tower`, shallow to deep.
        parts: Layer name with `.attn` or `.mlp` to the submodule that computes it.
        num_prefix: Class tokens ahead of the patch tokens in a layer's output.
    """

    def __init__(
        self,
        tower: nn.Module,
        pooled: Callable[[nn.Module, Tensor], Tensor],
        *,
        blocks: Sequence[str],
        parts: dict[str, str] | None = None,
        num_prefix: int = 0,
    ) -> None:
        super().__init__()
        self.tower = tower
        self._pooled = pooled
        self._modules_of = {name: name for name in blocks} | (parts or {})
        self._num_prefix = num_prefix
        self.layers: tuple[str, ...] = tuple(blocks)
        self.parts: tuple[str, ...] = tuple(parts or ())

    def forward(self, images: Tensor) -> Tensor:
        """Same as `pooled`."""
        return self.pooled(images)

    def pooled(self, images: Tensor) -> Tensor:
        """Embeddings `(N, D)` in the space shared with texts, not normalised."""
        return self._pooled(self.tower, images)

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        """Outputs of `layers`; the pass ends when all of them have run."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output
            if len(outputs) == len(set(layers)):
                raise _ReachedError

        hooks = [
            self.tower.get_submodule(self._modules_of[name]).register_forward_hook(
                lambda _module, _args, output, name=name: keep(name, output)
            )
            for name in set(layers)
        ]
        try:
            self._pooled(self.tower, images)
        except _ReachedError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [self._split(outputs[name]) for name in layers]

    def _split(self, output: Tensor) -> Tokens:
        if output.ndim == 4:  # (N, D, H, W)
            return Tokens(output.flatten(2).transpose(1, 2), None)
        if not self._num_prefix:
            return Tokens(output, None)
        return Tokens(output[:, self._num_prefix :], output[:, : self._num_prefix])
