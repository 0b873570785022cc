"""A witness to an attack: what the victim was seen to answer while it was attacked, whatever came back in the end."""

from typing import NamedTuple, final

import torch
from torch import Tensor

from robustbench_x.threat import ThreatModel

__all__ = ["Testimony", "Witness"]

_PLACES = 256
_SURE = 0.05
"""Logit margin by which a fooled answer counts: the judge's fp32 pass in another batch must agree."""
_LATE = 10
_OUTSIDE = 1e-6


class Testimony(NamedTuple):
    """What was seen of each sample: whether it was fooled inside the budget, and the share of its whole gain in margin
    that came with the last ten looks, NaN with fewer than twenty."""

    fooled: list[bool]
    late_gain: list[float]


@final
class Witness:
    """Watches the answers that an attack gets about the very victim it is judged on.

    An answer belongs to the sample whose clean image is nearest, by a few hundred pixels. Nothing here waits for the
    device until `testify`.

    Args:
        inputs: Clean images `(N, 3, H, W)`.
        labels: `(N,)`.
        threat: The budget; what lies outside it is no success.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, threat: ThreatModel) -> None:
        self._inputs = inputs
        self._labels = labels
        self._threat = threat
        size = inputs[0].numel()
        generator = torch.Generator().manual_seed(size)
        places = torch.randperm(size, generator=generator)[:_PLACES].to(inputs.device)
        self._places = places
        self._sketch = inputs.flatten(1)[:, places]
        self._best = torch.full((len(inputs),), -torch.inf, device=inputs.device)
        self._looks: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def look(self, images: Tensor, logits: Tensor) -> None:
        """Takes note of `logits` `(M, K)` for `images` `(M, 3, H, W)`; what is no image of the sample's size is not
        noted."""
        if images.shape[1:] != self._inputs.shape[1:] or logits.shape[1] < 2:
            return
        images, logits = images.detach(), logits.detach().float()
        sketch = images.flatten(1)[:, self._places]
        index = torch.cdist(sketch, self._sketch, p=1).argmin(dim=1)
        labels = self._labels[index]
        own = logits.gather(1, labels[:, None]).squeeze(1)
        margin = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - own
        inside = self._threat.overrun(images, self._inputs[index]) <= _OUTSIDE
        margin = torch.where(inside & margin.isfinite(), margin, -torch.inf)
        self._best = self._best.scatter_reduce(0, index, margin, "amax")
        self._looks.append((index, margin))

    def testify(self) -> Testimony:
        """What was seen, sample by sample."""
        count = len(self._inputs)
        paths: list[list[float]] = [[] for _ in range(count)]
        for index, margin in self._looks:
            for sample, value in zip(index.tolist(), margin.tolist(), strict=True):
                paths[sample].append(value)
        return Testimony((self._best > _SURE).tolist(), [_late_gain(path) for path in paths])


def _late_gain(path: list[float]) -> float:
    """The share of the rise of the running best that came with the last ten looks."""
    seen = [value for value in path if value > -torch.inf]
    if len(seen) < 2 * _LATE:
        return float("nan")
    whole = max(seen) - seen[0]
    return (max(seen) - max(seen[:-_LATE])) / whole if whole > 0 else 0.0
