"""What the attacks that only ask for logits share: judging candidates, and how many questions a sample may cost.

A random victim draws anew at every look, and of many looks one shows nearly any image fooled. There what looks better
is asked about again, on fresh draws, and every one of them is a question.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from robustbench_x.views import QueryView, WhiteboxView
from robustbench_x_attacks import losses
from robustbench_x_attacks.iterative import Best, Evaluation

__all__ = ["Asking", "affordable", "confirmed"]

_DRAWS = 8
"""Fresh draws that judge what looks better on a random victim."""
_LEAVING_MARGIN = 1e-2
"""Logit margin by which a sample must be fooled to leave, as in every iterative attack here."""
Ask = Callable[[Tensor], Tensor]
"""Pixels `(N, 3, H, W)` in [0, 1] to logits `(N, K)`; called without gradients."""


@final
class Asking:
    """Asks for the logits of candidates, holds the best one of each sample and counts what it has cost.

    Of a random victim a candidate that looks better is asked about again, and so is what is held once the candidate is
    better on average: the wider mean is held, so that no lucky draw is. It is offered with that mean, but by less than
    lets a sample leave unless every fresh draw was fooled.

    Args:
        view: Labels of the samples.
        ask: Pixels to logits.
        keep: Where candidates are offered, in this order; the first is told of logits that are NaN or infinite.
    """

    def __init__(self, view: WhiteboxView | QueryView, ask: Ask, *keep: Best) -> None:
        self.view = view
        self.best = keep[0]
        self.spent = torch.zeros(len(view.inputs), dtype=torch.long, device=view.inputs.device)
        """Questions that each sample has cost, `(N,)`."""
        self._ask = ask
        self._keep = keep
        self._random = view.query.stochastic if isinstance(view, QueryView) else view.model.stochastic
        self._images = view.inputs.clone()
        self._total = torch.full((len(view.inputs),), -torch.inf, device=view.inputs.device)
        self._least = self._total.clone()
        self._draws = torch.ones_like(self.spent)
        self._offered = self._total.clone()

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        """Which of the `images` of the samples `index` are held now, boolean `(len(index),)`."""
        with torch.no_grad():
            logits = self._ask(images)
        self.spent[index] += 1
        self.best.breaks(index, ~logits.isfinite().all(dim=1))
        margin = _margin(logits, self.view.labels[index])
        better = margin > self._mean(index)
        if self._random:
            return self._challenge(index, images, better)
        self._total[index] = torch.where(better, margin, self._total[index])
        for best in self._keep:
            best.offer(index, images, Evaluation(margin, margin))
        return better

    def affords(self, index: Tensor, queries: int) -> Tensor:
        """Which of `index` may be asked about once more where each may cost `queries`, whatever the answer."""
        return self.spent[index] + (1 + 2 * _DRAWS if self._random else 1) <= queries

    def _mean(self, index: Tensor) -> Tensor:
        return self._total[index] / self._draws[index]

    def _challenge(self, index: Tensor, images: Tensor, better: Tensor) -> Tensor:
        """Draws afresh for the candidates that look `better`, then for what they would replace."""
        total, least = self._draw(index, images, better)
        better = better & (total / _DRAWS > self._mean(index))
        holding = better & self._total[index].isfinite()
        again, smallest = self._draw(index, self._images[index], holding)
        rows = index[holding]
        self._total[rows] += again[holding]
        self._least[rows] = self._least[rows].minimum(smallest[holding])
        self._draws[rows] += _DRAWS
        taken = better & (total / _DRAWS > self._mean(index))
        rows = index[taken]
        self._images[rows], self._total[rows] = images[taken], total[taken]
        self._least[rows], self._draws[rows] = least[taken], _DRAWS
        self._offer(index[holding | taken])
        return taken

    def _draw(self, index: Tensor, images: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and smallest of the margins on fresh draws of the images that are `chosen`; -inf for the others."""
        total = torch.full((len(index),), -torch.inf, device=images.device)
        least = total.clone()
        if chosen.any():
            rows = index[chosen]
            margins, finite = _margins(self._ask, images[chosen], self.view.labels[rows])
            self.spent[rows] += _DRAWS
            self.best.breaks(rows, ~finite)
            total[chosen] = margins.sum(dim=0).nan_to_num(nan=-torch.inf, posinf=torch.inf)
            least[chosen] = margins.amin(dim=0)
        return total, least

    def _offer(self, index: Tensor) -> None:
        """Offers what is held of the samples `index`, in place of what was offered of them before."""
        mean = self._mean(index)
        score = torch.where(self._least[index] > _LEAVING_MARGIN, mean, mean.clamp(max=_LEAVING_MARGIN))
        for best in self._keep:
            ours = best.score[index] == self._offered[index]
            best.score[index[ours]] = -torch.inf
            best.offer(index, self._images[index], Evaluation(score, score))
        self._offered[index] = score


def confirmed(margin: Tensor, chosen: Tensor, ask: Ask, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`margin` `(N,)` with the mean of fresh draws in place of the values that are `chosen`, and the smallest of them.

    For a random victim. The draw that `margin` was chosen by is not among them: it was lucky. The smallest is `margin`
    itself where nothing is drawn.
    """
    mean, least = margin.clone(), margin.clone()
    if chosen.any():
        margins, _ = _margins(ask, images[chosen], labels[chosen])
        mean[chosen] = margins.mean(dim=0).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        least[chosen] = margins.amin(dim=0)
    return mean, least


def affordable(view: QueryView, queries: int) -> int:
    """Questions each sample may cost: `queries`, or an even share of what remains.

    An even share, so that what a sample is worth does not hang on how soon the others of its batch fall.
    """
    remaining = view.query.remaining
    return queries if remaining is None else min(queries, remaining // max(len(view.inputs), 1))


def _margins(ask: Ask, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Margins on fresh draws, `(draws, N)`, -inf for NaN, and which images had finite logits in all, `(N,)`."""
    with torch.no_grad():
        draws = [ask(images) for _ in range(_DRAWS)]
    finite = torch.stack([logits.isfinite().all(dim=1) for logits in draws]).all(dim=0)
    return torch.stack([_margin(logits, labels) for logits in draws]), finite


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    return losses.margin(logits, labels).nan_to_num(nan=-torch.inf, posinf=torch.inf)
