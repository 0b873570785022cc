"""The Square attack: random search with windows that shrink by a schedule."""

import functools
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustbench_x.plugin import AttackSpec, param
from robustbench_x.randomness import SampleRandom
from robustbench_x.threat import ThreatModel, patch_mask
from robustbench_x.views import QueryView
from robustbench_x_attacks.autoattack.asking import Asking, affordable
from robustbench_x_attacks.iterative import Best

__all__ = ["SPEC", "Square", "hunt", "share"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After which of 10,000 iterations the windows' area is halved (Andriushchenko et al. 2020, section 4.1)."""
_TILES = 5
"""Windows a side that the Euclidean start is tiled with."""


@final
@dataclass(frozen=True, kw_only=True)
class Square:
    """Square attack (Andriushchenko et al. 2020, arXiv 1912.00049), linf and l2, on the margin of the logits.

    Starts at vertical stripes (linf) or tiled windows (l2), then changes one random window at a time and keeps what
    narrows the margin. Departures: every sample draws windows of its own, as in the paper, where AutoAttack's code
    shares one among the batch; windows may touch the last row and column; a linf window that would change nothing
    gets the opposite signs; the start counts as a query; the l2 window takes over the freed mass per channel as in
    the paper. A cap on queries is shared evenly and the schedule fitted to it. A sample leaves once it is fooled
    by a safe margin unless exhaustive images are asked for; one that resists returns its worst image. Of a random
    victim a candidate that looks better is asked about again, and judged by the mean, out of the same queries.
    """

    queries: int = param(5000, "queries per sample, fewer where they are capped below")
    p_init: float = param(0.8, "share of the image in the first window")

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries={self.queries} must be at least 1")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init={self.p_init} must lie in (0, 1]")

    def run(self, view: QueryView) -> Tensor:
        """Adversarial images; access `scores`."""
        if view.threat.radius == 0:
            return view.inputs.clone()
        asking = Asking(view, view.query, Best(view.inputs))
        hunt(asking, queries=affordable(view, self.queries), p_init=self.p_init, exhaustive=view.exhaustive)
        asking.best.spoil()
        return asking.best.images


def hunt(asking: Asking, *, queries: int, p_init: float, exhaustive: bool) -> None:
    """Spends at most `queries` on every sample that `asking.best` holds as pending, and offers it the candidates.

    Without queries the start is offered unjudged.
    """
    view = asking.view
    index = asking.best.pending(exhaustive=exhaustive)
    if not len(index):
        return
    squares = _l2 if view.threat.norm == "l2" else _linf
    start = _tiles if view.threat.norm == "l2" else _stripes
    clean = view.inputs[index]
    images = view.threat.project(start(clean, view.threat, view.random, index), clean)
    if not asking.affords(index, queries).all():
        asking.best.settle(index, images)
        return
    asking(index, images)
    while True:
        staying = asking.affords(index, queries)
        if not exhaustive:
            staying &= ~asking.best.done(index)
        if not staying.all():
            index, clean, images = index[staying], clean[staying], images[staying]
            if not len(index):
                return
        area = share(int(asking.spent[index].min()) - 1, queries, p_init) * clean[0, 0].numel()
        draws = view.random.uniform((5 + clean.shape[1],), index)
        candidates = squares(images, clean, view.threat, area, draws)
        images = torch.where(_wide(asking(index, candidates)), candidates, images)


def share(iteration: int, queries: int, p_init: float = 0.8) -> float:
    """The share of the image that a window covers at `iteration` of `queries`, by the schedule for 10,000."""
    scaled = iteration * 10000 // queries
    return p_init * 0.5 ** sum(scaled > mark for mark in _HALVINGS)


def _stripes(clean: Tensor, threat: ThreatModel, random: SampleRandom, index: Tensor) -> Tensor:
    """Vertical stripes at the full budget, a sign for each column and channel."""
    return clean + threat.eps * random.signs((clean.shape[1], 1, clean.shape[3]), index)


def _linf(images: Tensor, clean: Tensor, threat: ThreatModel, area: float, draws: Tensor) -> Tensor:
    """One window set to the edge of the budget, with one sign per channel."""
    height, width = clean.shape[2:]
    side = min(max(round(math.sqrt(area)), 1), height, width)
    window = patch_mask(_corners(draws[:, :2], side, height, width), side, height, width)
    jump = 2 * threat.eps * _signs(draws[:, 5:]) * window
    candidates = threat.project(images + jump, clean)
    idle = (candidates == images).flatten(1).all(dim=1)
    return torch.where(_wide(idle), threat.project(images - jump, clean), candidates)


def _tiles(clean: Tensor, threat: ThreatModel, random: SampleRandom, index: Tensor) -> Tensor:
    """Bumps side by side over the whole image, scaled to the sphere."""
    channels, height, width = clean.shape[1:]
    side = max(min(height, width) // _TILES, 1)
    rows, columns = height // side, width // side
    draws = random.uniform((rows, columns, 1 + channels), index)
    change = torch.zeros_like(clean)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    for row in range(rows):
        for column in range(columns):
            bumps = _bumps(side, draws[:, row, column, 0]) * _signs(draws[:, row, column, 1:])
            y, x = top + row * side, left + column * side
            change[:, :, y : y + side, x : x + side] = bumps
    return clean + threat.eps * threat.ascent(change)


def _l2(images: Tensor, clean: Tensor, threat: ThreatModel, area: float, draws: Tensor) -> Tensor:
    """One window is emptied; what it held, and what the budget has left, goes into another one."""
    channels, height, width = clean.shape[1:]
    side = max(round(math.sqrt(area)), 3)
    side = min(side + 1 - side % 2, height, width)
    change = images - clean
    corners = _corners(draws[:, :2], side, height, width)
    emptied = patch_mask(_corners(draws[:, 2:4], side, height, width), side, height, width)
    union = patch_mask(corners, side, height, width) | emptied
    freed = (change * union).square().sum(dim=(2, 3), keepdim=True)
    spare = (threat.eps**2 - change.square().sum(dim=(1, 2, 3), keepdim=True)).clamp(min=0) / channels
    place = _window(corners, side)
    sample = torch.arange(len(change), device=change.device)[:, None, None]
    inside = change.permute(0, 2, 3, 1)[sample, *place].permute(0, 3, 1, 2)
    bump = _bumps(side, draws[:, 4]) * _signs(draws[:, 5:]) + _unit(inside)
    change = change.masked_fill(emptied, 0).permute(0, 2, 3, 1).contiguous()
    change[sample, *place] = (_unit(bump) * (freed + spare).sqrt()).permute(0, 2, 3, 1)
    change = change.permute(0, 3, 1, 2)
    return threat.project(clean + threat.eps * threat.ascent(change), clean)


def _corners(draws: Tensor, side: int, height: int, width: int) -> Tensor:
    """Top left pixels `(N, 2)` of windows anywhere in the image, from draws `(N, 2)` in [0, 1)."""
    places = torch.tensor([height - side + 1, width - side + 1], device=draws.device)
    return (draws * places).long().minimum(places - 1)


def _window(corners: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Row and column indices of the windows, `(N, side, 1)` and `(N, 1, side)`."""
    steps = torch.arange(side, device=corners.device)
    return corners[:, 0, None, None] + steps[:, None], corners[:, 1, None, None] + steps


def _signs(draws: Tensor) -> Tensor:
    """Draws `(N, C)` in [0, 1) as signs `(N, C, 1, 1)`."""
    return torch.where(draws < 0.5, 1.0, -1.0)[:, :, None, None]


def _unit(change: Tensor) -> Tensor:
    """Each channel of `(N, C, s, s)` scaled to norm 1, zero where it is zero."""
    return change / change.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp(min=1e-12)


def _bumps(side: int, draws: Tensor) -> Tensor:
    """Bumps of opposite sign `(N, 1, side, side)`, of norm 1: one above the other or, by `draws` `(N,)`, beside it."""
    pair = _pair(side).to(draws.device)
    return torch.where(_wide(draws > 0.5), pair.T, pair)


@functools.lru_cache(maxsize=256)
def _pair(side: int) -> Tensor:
    """The paper's eta `(side, side)`: a positive bump in the upper half, a negative one in the lower, norm 1."""
    if side < 2:
        return torch.ones(side, side)
    pair = torch.cat([_bump(side // 2, side), -_bump(side - side // 2, side)])
    unit: Tensor = pair / pair.norm()
    return unit


def _bump(height: int, width: int) -> Tensor:
    """Nested squares around the centre, the k-th adding 1 / k^2, norm 1 (equation 3 of the paper)."""
    down = (torch.arange(height) - height // 2).abs()[:, None]
    across = (torch.arange(width) - width // 2).abs()[None, :]
    heights = (1 / torch.arange(1, max(height, width) // 2 + 2).float().square()).flip(0).cumsum(0).flip(0)
    bump = heights[torch.maximum(down, across)]
    unit: Tensor = bump / bump.norm()
    return unit


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


SPEC = AttackSpec(
    name="square",
    summary="black-box random search with shrinking windows",
    factory=Square,
    source="Andriushchenko et al. 2020, arXiv 1912.00049",
    access="scores",
    norms=("linf", "l2"),
)
