"""A control for attacks that claim to search: blind draws from the corners of the budget."""

import itertools
from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from torch import Tensor

from robustbench_x.plugin import AttackSpec, param
from robustbench_x.views import QueryView
from robustbench_x_attacks.autoattack.asking import Asking, affordable
from robustbench_x_attacks.iterative import Best

__all__ = ["SPEC", "RandomSearch"]

_GRIDS = (0, 2, 0, 4, 0, 8, 0, 16)
"""Cells a side that share a sign, draw by draw; 0: each pixel has its own."""


@final
@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """Independent draws of signs at the full budget, per pixel and in blocks by turns; the worst is kept.

    After Carlini et al. 2019 (arXiv 1902.06705, section 4.3): a search that learns nothing from its answers must not
    beat an attack that follows gradients. There 10,000 draws of Gaussian noise an image; here corners of the budget,
    which are larger changes, half of them of low frequency, which networks hear better. In the Euclidean norm
    the signs are scaled to the sphere, in a patch they are black and white. A sample leaves once it is fooled by a
    safe margin unless exhaustive images are asked for. A random victim is asked again where a draw looks better, as by
    `square`.
    """

    queries: int = param(200, "draws per sample, fewer where the queries are capped below")

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries={self.queries} must be at least 1")

    def run(self, view: QueryView) -> Tensor:
        """The worst draws; access `scores`."""
        if view.threat.radius == 0:
            return view.inputs.clone()
        asking = Asking(view, view.query, Best(view.inputs))
        queries = affordable(view, self.queries)
        for number in itertools.count():
            index = asking.best.pending(exhaustive=view.exhaustive)
            index = index[asking.affords(index, queries)]
            if not len(index):
                break
            asking(index, _draw(view, index, _GRIDS[number % len(_GRIDS)]))
        asking.best.spoil()
        return asking.best.images


def _draw(view: QueryView, index: Tensor, grid: int) -> Tensor:
    channels, height, width = view.inputs.shape[1:]
    cells = (min(grid, height), min(grid, width)) if grid else (height, width)
    signs = F.interpolate(view.random.signs((channels, *cells), index), (height, width))
    clean = view.inputs[index]
    return view.threat.project(clean + view.threat.radius * signs, clean)


SPEC = AttackSpec(
    name="random_search",
    summary="control: the worst of many random sign patterns, per pixel and in blocks",
    factory=RandomSearch,
    source="Carlini et al. 2019, arXiv 1902.06705 (brute-force random search)",
    access="scores",
    norms=("linf", "l2", "patch"),
    control=True,
)
