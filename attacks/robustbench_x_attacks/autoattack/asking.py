"""What the attacks that ask for logits share: judging candidates, and how many questions a sample may cost.

A random victim draws anew at every look, and of many looks one shows nearly any image fooled. There a candidate is
judged on several fresh draws, and every one of them is a question.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from robustbench_x.views import QueryView, WhiteboxView
from robustbench_x_attacks import losses
from robustbench_x_attacks.iterative import Best, Evaluation

__all__ = ["EOT_HELP", "LEAVING_MARGIN", "Asking", "Averaged", "Keeper", "Looks", "affordable", "look", "question"]

LEAVING_MARGIN = 1e-2
"""Logit margin by which a sample must be fooled inside the budget to leave, as in every iterative attack here."""
EOT_HELP = "fresh draws that judge a candidate when the victim is random; each is a pass"


class Looks(NamedTuple):
    """What several looks at images say, each field `(N,)`.

    `mean` is the margin averaged over the draws, -inf where the looks were broken off; `least` the smallest one, by
    which every draw is fooled; `asked` how many there were; `finite` whether every logit was.
    """

    mean: Tensor
    least: Tensor
    asked: Tensor
    finite: Tensor


def look(
    ask: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, draws: int, beat: Tensor | None = None
) -> Looks:
    """Looks at `images` up to `draws` times, and no further at those whose running mean does not exceed `beat`.

    Most candidates of a search are no better than what it holds: this costs them few of the looks, while whatever is
    taken has had them all.

    Args:
        ask: Pixels `(N, 3, H, W)` in [0, 1] to logits `(N, K)`; called without gradients.
        images: `(N, 3, H, W)`.
        labels: `(N,)`.
        draws: Looks at an image that goes on exceeding `beat`; 1 for a victim without randomness.
        beat: Averaged margins `(N,)`; None for none.
    """
    rows = torch.arange(len(images), device=images.device)
    total = torch.zeros(len(images), device=images.device)
    least = torch.full_like(total, torch.inf)
    asked, finite = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    for draw in range(draws):
        with torch.no_grad():
            logits = ask(images if len(rows) == len(images) else images[rows])
        margin = losses.margin(logits, labels[rows]).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        finite[rows] &= logits.isfinite().all(dim=1)
        total[rows] += margin
        least[rows] = least[rows].minimum(margin)
        asked[rows] += 1
        if beat is not None and draw + 1 < draws:
            rows = rows[total[rows] / (draw + 1) > beat[rows]]
            if not len(rows):
                break
    whole = asked == draws
    mean = (total / asked).nan_to_num(nan=-torch.inf, posinf=torch.inf)
    return Looks(mean.masked_fill(~whole, -torch.inf), least.masked_fill(~whole, -torch.inf), asked, finite)


class Keeper(Protocol):
    """Who keeps the best candidates and says which samples are still worth work."""

    @property
    def images(self) -> Tensor:
        """The best images so far."""

    def pending(self, *, exhaustive: bool) -> Tensor:
        """Positions of the samples still worth attacking."""

    def offer(self, index: Tensor, images: Tensor, result: Evaluation) -> None:
        """Takes the images that beat what is held; the loss is the averaged margin, the margin the smallest."""

    def settle(self, index: Tensor, images: Tensor) -> None:
        """Takes images that nobody judged."""

    def breaks(self, index: Tensor, broken: Tensor) -> None:
        """Notes which of `index` met NaN or infinity."""

    def spoil(self) -> None:
        """Makes NaN of what broke and fools nothing."""

    def done(self, index: Tensor) -> Tensor:
        """Which of `index` are fooled by a safe margin."""


@final
class Averaged:
    """The images of the widest averaged margin; a sample is done when every draw of its image was fooled.

    For a random victim. Where all margins are those of one draw it does what `Best` does.
    """

    def __init__(self, inputs: Tensor) -> None:
        self._best = Best(inputs)
        self._confirmed = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)

    @property
    def images(self) -> Tensor:
        return self._best.images

    def held(self, index: Tensor) -> Tensor:
        """The averaged margin of the images of `index`, -inf where none was taken yet."""
        return self._best.score[index]

    def pending(self, *, exhaustive: bool) -> Tensor:
        everyone = torch.arange(len(self._confirmed), device=self._confirmed.device)
        return everyone if exhaustive else everyone[~self._confirmed]

    def offer(self, index: Tensor, images: Tensor, result: Evaluation) -> None:
        assert result.margin is not None, "a margin is known wherever logits are"
        mean = result.loss
        better = mean > self.held(index)
        self._confirmed[index] = torch.where(better, result.margin > LEAVING_MARGIN, self._confirmed[index])
        self._best.offer(index, images, Evaluation(mean, mean))

    def settle(self, index: Tensor, images: Tensor) -> None:
        unjudged = self.held(index).isneginf()
        self._best.settle(index[unjudged], images[unjudged])

    def breaks(self, index: Tensor, broken: Tensor) -> None:
        self._best.breaks(index, broken)

    def spoil(self) -> None:
        self._best.spoil()

    def done(self, index: Tensor) -> Tensor:
        return self._confirmed[index]


@final
class Asking:
    """Asks for the logits of candidates, keeps the best of them and counts what each sample has cost.

    Args:
        view: Labels of the samples.
        ask: As for `look`.
        keep: Where candidates are offered, in this order; the first is told of logits that are NaN or infinite.
        queries: Questions that each sample may cost.
        draws: Fresh draws that judge a candidate before it is taken, fewer where `queries` is; 1 unless the victim is
            random.
    """

    def __init__(
        self,
        view: WhiteboxView | QueryView,
        ask: Callable[[Tensor], Tensor],
        *keep: Keeper,
        queries: int,
        draws: int = 1,
    ) -> None:
        self.view = view
        self.best = keep[0]
        self.queries = queries
        self.draws = max(min(draws, queries), 1)
        self._ask = ask
        self._keep = keep
        self._spent = torch.zeros(len(view.inputs), dtype=torch.long, device=view.inputs.device)

    def __call__(self, index: Tensor, images: Tensor, *, beat: Tensor | None = None) -> Tensor:
        """By how much the images of the samples `index` are misclassified, `(len(index),)`, on average; -inf for NaN.

        Candidates that do not exceed the averaged margin `beat` may cost fewer than `draws` questions, and get -inf.
        """
        looks = look(self._ask, images, self.view.labels[index], draws=self.draws, beat=beat)
        self._spent[index] += looks.asked
        self.best.breaks(index, ~looks.finite)
        for keeper in self._keep:
            keeper.offer(index, images, Evaluation(looks.mean, looks.least))
        return looks.mean

    def affords(self, index: Tensor) -> Tensor:
        """Which of `index` may be asked about once more, on every draw."""
        return self._spent[index] + self.draws <= self.queries

    def progress(self, index: Tensor) -> Tensor:
        """Questions each of `index` has cost since its first candidate, `(len(index),)`."""
        return self._spent[index] - self.draws


def question(view: QueryView, *, queries: int, eot: int) -> Asking:
    """Asks the query function of `view`, within its cap; a random victim `eot` times for what is taken."""
    each = affordable(view, queries)
    if view.query.stochastic:
        return Asking(view, view.query, Averaged(view.inputs), queries=each, draws=eot)
    return Asking(view, view.query, Best(view.inputs), queries=each)


def affordable(view: QueryView, queries: int) -> int:
    """Questions each sample may cost: `queries`, or an even share of what remains.

    An even share, so that what a sample is worth does not hang on how soon the others of its batch fall.
    """
    remaining = view.query.remaining
    return queries if remaining is None else min(queries, remaining // max(len(view.inputs), 1))
