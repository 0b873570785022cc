"""The nearest point of a hyperplane inside the box [0, 1], for many points at once."""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["to_hyperplane"]

_MOST_ROUNDS = 64


def to_hyperplane(points: Tensor, normals: Tensor, gaps: Tensor, norm: Literal["linf", "l2"]) -> Tensor:
    """The smallest change `d` `(N, D)` with `normals . d = gaps` that keeps `points + d` in [0, 1].

    Where the box does not reach the hyperplane, the corner nearest to it; zero where the normal or the gap is.

    Both norms have the solution `d_i = sign(n_i gap) min(t v_i, room_i)`, with `v_i` 1 (linf) or `|n_i|` (l2) and
    `room_i` the way to the box (Croce & Hein 2020, arXiv 1907.02044, section 3.2), so that `normals . d` is concave
    and piecewise linear in t. There the paper sorts the kinks; Newton's method from t = 0 approaches the root from
    below, ends on it exactly after finitely many rounds, and needs a handful where few pixels meet the box.

    Args:
        points: `(N, D)` in [0, 1].
        normals: `(N, D)`, finite, of any scale.
        gaps: `(N,)`, finite: how far `normals . points` is to rise.
        norm: What is smallest about `d`.
    """
    # A gradient of 1e-25 squares to zero in float32: measured by its largest entry it does not.
    largest = normals.abs().amax(dim=1, keepdim=True)
    weight = torch.where(largest > 0, normals.abs() / largest.clamp(min=torch.finfo(largest.dtype).tiny), 0.0)
    toward = normals.sign() * gaps.sign()[:, None]
    room = torch.where(toward > 0, 1 - points, points).clamp(min=0)
    pace = weight if norm == "l2" else torch.ones_like(weight)
    wanted = gaps.abs().double()[:, None] / largest.double()
    reach = (weight * room).sum(dim=1, keepdim=True, dtype=torch.float64)
    time = torch.where(reach >= wanted, 0.0, torch.inf).double()
    for _ in range(_MOST_ROUNDS):
        free = pace * time.to(pace.dtype) < room
        held = (weight * room).masked_fill(free, 0).sum(dim=1, keepdim=True, dtype=torch.float64)
        slope = (weight * pace).masked_fill(~free, 0).sum(dim=1, keepdim=True, dtype=torch.float64)
        later = torch.where(slope > 0, (wanted - held) / slope, torch.inf).maximum(time)
        if (later <= time * (1 + 1e-9)).all():
            break
        time = later
    path = pace * time.to(pace.dtype)
    return toward * torch.where(path < room, path, room)
