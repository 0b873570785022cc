"""`fractal:` labelled images without a download: renderings of iterated function systems (IFS).

A class is one random IFS, a set of contractive affine maps whose attractor is the picture; its images vary
in small parameter jitter, rotation, mirroring, colour, background and the random orbit. After

* Kataoka et al., "Pre-training without Natural Images" (FractalDB), ACCV 2020: a class is a system, its
  instances are parameter variations, systems that fill too little of the frame are thrown away;
* Anderson and Farrell, "Improving Fractal Pre-training", WACV 2022: maps are built from their singular
  value decomposition, so they contract by construction; with N maps, sum(sigma_1 + 2 sigma_2) is held
  within [(5 + N) / 2, (6 + N) / 2], which is where attractors are neither dust nor blobs; fractals are
  coloured and lie on a random background.

Departures: singular values are drawn by splitting a uniform total at random among the maps; a system is
also refused when it fills too *much* of the frame or looks like an earlier class; orbits are many short
ones, started on the maps' fixed points (which lie on the attractor) instead of one long one; map
probabilities are rounded to 1/256; colour follows the maps an orbit went through; backgrounds are smooth
noise.
"""

import functools
import math
import re
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from robustbench_x.data.dataset import Dataset, DataSource, Item
from robustbench_x.errors import ConfigError, near_matches
from robustbench_x.randomness import derive_seed

__all__ = ["SOURCE"]

_Floats = NDArray[np.float32]

_MAPS = (2, 3, 4)
_MAX_SIGMA = 0.97
_FILL = (0.2, 0.55)
_MAX_LIKENESS = 0.75
_SKETCH = 16
_STEPS, _WARM_UP = 24, 8
_MARGIN = 0.05
_OPTIONS = {  # default, least, most; points=0 stands for two points a pixel
    "classes": (10, 2, 1000),
    "train": (100, 0, 100_000),
    "test": (20, 1, 100_000),
    "size": (224, 16, 2048),
    "seed": (0, 0, 2**63 - 1),
    "points": (0, 0, 10_000_000),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class _System:
    """N maps as rotation(left) diag(sigmas) rotation(right) diag(signs) x + shift; angles in radians."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    signs: NDArray[np.float64]
    shift: NDArray[np.float64]

    def maps(self) -> NDArray[np.float64]:
        """`(N, 2, 3)`: the linear part beside the translation."""
        linear = _rotation(self.left) * self.sigmas[:, None, :] @ (_rotation(self.right) * self.signs[:, None, :])
        return np.concatenate([linear, self.shift[:, :, None]], axis=2)


def _open(source: str, rest: str, _seed: int) -> Dataset:
    # The audit's seed is left out on purpose: the images are a fixed data set, named completely by `source`.
    options = _parse(source, rest)
    seed, size = options["seed"], options["size"]
    systems = _systems(seed, options["classes"])
    render = functools.partial(_render, size=size, points=options["points"] or 2 * size**2)

    def split(name: str) -> tuple[Item, ...]:
        return tuple(
            Item(
                id=f"{name}/{_class_name(label)}/{index:05d}",
                label=label,
                load=functools.partial(render, system, derive_seed("fractal", seed, name, label, index)),
            )
            for label, system in enumerate(systems)
            for index in range(options[name])
        )

    return Dataset(
        source=source,
        classes=tuple(_class_name(label) for label in range(len(systems))),
        train=split("train"),
        test=split("test"),
        license="generated; no rights reserved",
        notes=("synthetic: attractors of random iterated function systems, not photographs",),
    )


SOURCE = DataSource(
    scheme="fractal",
    usage="fractal:classes=10,train=100,test=20,size=224,seed=0",
    summary="synthetic fractals, one class per iterated function system; train and test count images per class",
    open=_open,
)


def _class_name(label: int) -> str:
    return f"ifs{label:04d}"


def _parse(source: str, rest: str) -> dict[str, int]:
    given: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in _OPTIONS:
            near = near_matches(name, _OPTIONS)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"data '{source}': unknown option '{name}'; {hint}known: {', '.join(_OPTIONS)}")
        if name in given:
            raise ConfigError(f"data '{source}': {name} is given twice")
        _, least, most = _OPTIONS[name]
        if not (re.fullmatch("[0-9]{1,19}", text) and least <= int(text) <= most):
            raise ConfigError(f"data '{source}': {name}='{text}' is not a whole number from {least} to {most}")
        given[name] = int(text)
    return {name: given.get(name, default) for name, (default, _, _) in _OPTIONS.items()}


def _systems(seed: int, classes: int) -> list[_System]:
    """The first `classes` systems of `seed`: asking for more classes keeps the earlier ones."""
    systems: list[_System] = []
    seen = np.empty((0, _SKETCH**2))
    for label in range(classes):
        limit = _MAX_LIKENESS
        rng = np.random.default_rng(derive_seed("fractal", seed, "system", label))
        for attempt in range(1, 10_000):
            system = _draw_system(rng)
            fill, sketches = _sketch(system, rng)
            if _FILL[0] <= fill <= _FILL[1] and (not len(seen) or (seen @ sketches.T).max() <= limit):
                break
            # With hundreds of classes the room gets tight; better a closer neighbour than an endless search.
            limit += 0.001 if attempt > 200 else 0.0
        systems.append(system)
        seen = np.concatenate([seen, sketches[:1]])
    return systems


def _draw_system(rng: np.random.Generator) -> _System:
    n = int(rng.choice(_MAPS))
    alpha = rng.uniform((5 + n) / 2, (6 + n) / 2)
    while True:
        total = alpha * rng.dirichlet(np.full(n, 3.0))  # sigma_1 + 2 sigma_2 of each map
        if total.max() <= 3 * _MAX_SIGMA:
            break
    small = rng.uniform(np.maximum(0.02, (total - _MAX_SIGMA) / 2), np.maximum(0.02, total / 3))
    return _System(
        left=rng.uniform(-np.pi, np.pi, n),
        right=rng.uniform(-np.pi, np.pi, n),
        sigmas=np.stack([total - 2 * small, small], axis=1),
        signs=rng.choice([-1.0, 1.0], (n, 2)),
        shift=rng.uniform(-1, 1, (n, 2)),
    )


def _sketch(system: _System, rng: np.random.Generator) -> tuple[float, NDArray[np.float64]]:
    """The share of a 64 x 64 frame that is hit, and unit-norm coarse pictures `(2, K)`: plain and mirrored."""
    pixel, _ = _orbit(system.maps(), rng, size=64, points=12_000, angle=0.0, mirror=False)
    hit = (np.bincount(pixel, minlength=64 * 64) > 0).reshape(64, 64)
    coarse = hit.reshape(_SKETCH, 64 // _SKETCH, _SKETCH, 64 // _SKETCH).mean(axis=(1, 3))
    coarse = coarse - coarse.mean()
    both = np.stack([coarse, coarse[:, ::-1]]).reshape(2, -1)
    return float(hit.mean()), both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-9)


def _render(system: _System, seed: int, size: int, points: int) -> PIL.Image.Image:
    """One image of a class; equal arguments give equal pixels, whatever was rendered before."""
    rng = np.random.default_rng(seed)
    n = len(system.left)
    varied = _System(
        left=system.left + rng.normal(0, 0.06, n),
        right=system.right + rng.normal(0, 0.06, n),
        sigmas=np.minimum(system.sigmas * rng.uniform(0.94, 1.06, (n, 2)), _MAX_SIGMA),
        signs=system.signs,
        shift=system.shift + rng.normal(0, 0.04, (n, 2)),
    )
    angle, mirror = rng.normal(0, math.radians(8)), bool(rng.random() < 0.5)
    canvas = _background(rng, size)
    palette = _palette(rng)
    pixel, hue = _orbit(varied.maps(), rng, size=size, points=points, angle=angle, mirror=mirror)

    hits = np.bincount(pixel, minlength=size * size).astype(np.float32)
    mean_hue = np.bincount(pixel, weights=hue, minlength=size * size).astype(np.float32) / np.maximum(hits, 1)
    cover = np.minimum(np.log1p(hits) / math.log1p(4 * points / size**2), 1)
    cover = np.where(hits > 0, 0.35 + 0.65 * cover, 0)[:, None]
    ink = palette[(mean_hue * 255).astype(np.uint8)]
    mixed = canvas + cover * (ink - canvas)
    return PIL.Image.fromarray((mixed + 0.5).astype(np.uint8).reshape(size, size, 3))


def _orbit(
    maps: NDArray[np.float64], rng: np.random.Generator, *, size: int, points: int, angle: float, mirror: bool
) -> tuple[NDArray[np.intp], _Floats]:
    """Pixel indices that orbits of `maps` visit in a frame fitted to them, and a hue in [0, 1] for each visit."""
    area = np.abs(np.linalg.det(maps[:, :, :2])) + 0.01  # a map that flattens everything still gets its turn
    table = np.searchsorted(np.cumsum(area / area.sum()), (np.arange(256) + 0.5) / 256)
    (a, b, e), (c, d, f) = maps[table].astype(np.float32).transpose(1, 2, 0)
    own_hue = np.linspace(0, 1, len(maps), dtype=np.float32)[table]

    chains = math.ceil(points / _STEPS)
    choice = rng.integers(0, 256, (_WARM_UP + _STEPS, chains), dtype=np.uint8)
    fixed = np.linalg.solve(np.eye(2) - maps[:, :, :2], maps[:, :, 2:])[:, :, 0].astype(np.float32)
    x, y = fixed[table[choice[0]]].T
    hue = own_hue[choice[0]]
    xs, ys, hues = (np.empty((_STEPS, chains), dtype=np.float32) for _ in range(3))
    for step, k in enumerate(choice):
        x, y = a[k] * x + b[k] * y + e[k], c[k] * x + d[k] * y + f[k]
        hue = 0.5 * (hue + own_hue[k])
        if step >= _WARM_UP:
            xs[step - _WARM_UP], ys[step - _WARM_UP], hues[step - _WARM_UP] = x, y, hue

    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    us, vs = (cos * xs - sin * ys).ravel(), (sin * xs + cos * ys).ravel()
    if mirror:
        us = -us
    (left, right), (top, bottom) = (us.min(), us.max()), (vs.min(), vs.max())
    scale = (1 - 2 * _MARGIN) * size / max(right - left, bottom - top, 1e-6)
    columns = ((us - (left + right) / 2) * scale + size / 2).astype(np.int32)
    rows = ((vs - (top + bottom) / 2) * scale + size / 2).astype(np.int32)
    return (rows * size + columns).astype(np.intp), hues.ravel()


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], axis=1), np.stack([sin, cos], axis=1)], axis=1)


def _background(rng: np.random.Generator, size: int) -> _Floats:
    """Dark smooth colour noise of two octaves, `(size * size, 3)` in [0, 255]."""
    canvas = np.zeros((size, size, 3), dtype=np.float32)
    for cells, height in ((3, 70), (12, 40)):
        noise = rng.integers(0, height, (cells, cells, 3), dtype=np.uint8)
        canvas += np.asarray(PIL.Image.fromarray(noise).resize((size, size), PIL.Image.Resampling.BICUBIC))
    return canvas.reshape(-1, 3)


def _palette(rng: np.random.Generator) -> _Floats:
    """256 colours, `(256, 3)` in [0, 255], through three random ones that stand out from the background."""
    stops = rng.uniform(60, 255, (3, 3))
    stops *= np.minimum(255 / stops.max(axis=1, keepdims=True), 2.0)
    ramp = np.linspace(0, 2, 256)
    return np.stack([np.interp(ramp, range(3), channel) for channel in stops.T], axis=1).astype(np.float32)
