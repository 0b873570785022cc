"""What the attacks that only ask for logits share: judging candidates, and how many questions a sample may cost."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from robustbench_x.views import QueryView, WhiteboxView
from robustbench_x_attacks import losses
from robustbench_x_attacks.iterative import Best, Evaluation

__all__ = ["Asking", "affordable"]


@final
class Asking:
    """Asks for the logits of candidates and keeps the best of them.

    Args:
        view: Labels of the samples.
        ask: Pixels `(N, 3, H, W)` in [0, 1] to logits `(N, K)`; called without gradients.
        keep: Where candidates are offered, in this order; the first is told of logits that are NaN or infinite.
    """

    def __init__(self, view: WhiteboxView | QueryView, ask: Callable[[Tensor], Tensor], *keep: Best) -> None:
        self.view = view
        self.best = keep[0]
        self._ask = ask
        self._keep = keep

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        """By how much the images of the samples `index` are misclassified, `(len(index),)`; -inf for NaN."""
        with torch.no_grad():
            logits = self._ask(images)
        self.best.breaks(index, ~logits.isfinite().all(dim=1))
        margin = losses.margin(logits, self.view.labels[index]).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        for best in self._keep:
            best.offer(index, images, Evaluation(margin, margin))
        return margin


def affordable(view: QueryView, queries: int) -> int:
    """Questions each sample may cost: `queries`, or an even share of what remains.

    An even share, so that what a sample is worth does not hang on how soon the others of its batch fall.
    """
    remaining = view.query.remaining
    return queries if remaining is None else min(queries, remaining // max(len(view.inputs), 1))
