"""The victim as torchattacks wants it: an nn.Module with a parameter, range-safe, that leaks no state."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from robustbench_x.errors import AttackError

__all__ = ["Adapter"]

Ask = Callable[[Tensor], Tensor]


@final
class Adapter(nn.Module):
    """Answers torchattacks' queries from a view's handle.

    The handle is asked for input gradients only: torchattacks calls `backward()`, which would otherwise add to
    the `.grad` of weights. Every answer is a fresh float32 tensor, since Square writes -inf into it. An image
    with a NaN (DeepFool divides by a zero gradient) is answered with NaN and not sent, so that it cannot take
    the rest of its batch down.

    Args:
        ask: Pixels `(N, 3, H, W)` in [0, 1] to logits `(N, K)`.
        device: Where torchattacks shall work; it reads this off the first parameter.
        num_classes: K.
        gradients: Whether `ask` gives gradients.
        clamps: Clamps to [0, 1] what is asked, with the gradient of the identity (straight-through).
        lifts: Shifts each row of logits so that its least is 1. Differences, softmax and gradients stay.
        columns: Answers these classes only.
        chunk: Most images sent at once.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        device: torch.device,
        num_classes: int,
        gradients: bool,
        clamps: bool = False,
        lifts: bool = False,
        columns: Tensor | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), device=device), requires_grad=False)
        self._ask = ask
        self._num_classes = num_classes
        self._gradients = gradients
        self._clamps = clamps
        self._lifts = lifts
        self._columns = columns
        self._chunk = chunk
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, K)` float32, or `(N, len(columns))`."""
        if self._clamps:
            # Not images + (clamped - images): far outside the range that rounds to something outside it again.
            images = images.detach().clamp(0.0, 1.0) + (images - images.detach()).nan_to_num(0.0, 0.0, 0.0)
        sound = images.detach().isfinite().flatten(1).all(dim=1)
        if sound.all():
            logits = self._answer(images)
        else:
            logits = images.flatten(1).sum(dim=1, keepdim=True).expand(-1, self._num_classes) * torch.nan
            if sound.any():
                logits = logits.index_copy(0, sound.nonzero().flatten(), self._answer(images[sound]))
        if self._columns is not None:
            logits = logits[:, self._columns]
        if self._lifts:
            logits = logits - logits.detach().amin(dim=1, keepdim=True) + 1.0
        return logits

    def _answer(self, images: Tensor) -> Tensor:
        if self._gradients and images.requires_grad and torch.is_grad_enabled():
            answer: Tensor = _InputGradient.apply(images, self._ask)
            return answer
        with torch.no_grad():
            pieces = torch.split(images.detach(), self._chunk or len(images))
            return torch.cat([self._ask(piece).detach().float() for piece in pieces])


class _InputGradient(torch.autograd.Function):
    """Runs the victim on a leaf of its own, so that `backward()` reaches the pixels and nothing else."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, ask: Ask) -> Tensor:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_(True)
            logits = ask(leaf)
        if not logits.requires_grad:
            raise AttackError("the victim's logits carry no gradient; use an attack with access 'scores'")
        ctx.leaf, ctx.logits = leaf, logits
        return logits.detach().float().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # DeepFool, JSMA and FAB come back once per class, so the graph must outlive the first visit.
        (gradient,) = torch.autograd.grad(
            ctx.logits, ctx.leaf, gradients[0].to(ctx.logits.dtype), retain_graph=True, allow_unused=True
        )
        return (torch.zeros_like(ctx.leaf) if gradient is None else gradient), None
