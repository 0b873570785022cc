"""The layer map inside an artefact: what attacking each layer alone does, as tensors that name their layers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_x.errors import SourceError
from robustbench_x.provenance import LayerDamage

__all__ = ["LayerMap", "pack_layers", "read_layers", "unpack_layers"]

_NAMES, _CHOSEN = "layers.names", "layers.chosen"
_FIGURES = ("layers.vulnerability", "layers.own", "layers.features")

_ROUNDING = 1e-3


class LayerMap(NamedTuple):
    """Layers shallow to deep; figures are mean cosine distances in [0, 2], `(L,)` each, `chosen` `(L,)` booleans.

    When a layer alone is attacked, `vulnerability` says how far the tokens of all layers turn on average, `own` how far
    its own do, and `features` how far the pooled features.
    """

    names: tuple[str, ...]
    vulnerability: Tensor
    own: Tensor
    features: Tensor
    chosen: Tensor


def pack_layers(layers: LayerMap) -> dict[str, Tensor]:
    """The tensors that an artefact holds; the names are UTF-8 bytes, a line each."""
    names = torch.frombuffer(bytearray("\n".join(layers.names).encode()), dtype=torch.uint8).clone()
    figures = dict(zip(_FIGURES, (layers.vulnerability, layers.own, layers.features), strict=True))
    return {_NAMES: names, **figures, _CHOSEN: layers.chosen}


def unpack_layers(tensors: Mapping[str, Tensor]) -> LayerMap | None:
    """The layer map of an artefact, None where it has none.

    Raises:
        SourceError: It has one whose parts do not belong together, or whose figures are no cosine distances.
    """
    if _NAMES not in tensors:
        return None
    names = tuple(bytes(tensors[_NAMES].cpu().to(torch.uint8).tolist()).decode(errors="replace").split("\n"))
    columns = [tensors.get(key, torch.empty(0)).cpu() for key in (*_FIGURES, _CHOSEN)]
    if any(column.shape != (len(names),) for column in columns):
        raise SourceError(f"the layer map names {len(names)} layers, but holds {[len(c) for c in columns]} figures")
    figures = torch.stack(columns[:-1]).double()
    if not bool(((figures > -_ROUNDING) & (figures < 2 + _ROUNDING)).all()):  # NaN fails too
        raise SourceError("the layer map holds figures that are no cosine distances in [0, 2]")
    vulnerability, own, features = figures
    return LayerMap(names, vulnerability, own, features, columns[-1].bool())


def read_layers(tensors: Mapping[str, Tensor], known: Sequence[str]) -> tuple[LayerDamage, ...]:
    """The layer map as a report stores it, empty where there is none.

    Args:
        tensors: Of an artefact.
        known: Names of the encoder's layers and their parts.

    Raises:
        SourceError: It is damaged, or names a layer that the encoder does not have.
    """
    found = unpack_layers(tensors)
    if found is None:
        return ()
    foreign = [name for name in found.names if name not in known]
    if foreign:
        raise SourceError(f"the layer map names '{foreign[0]}', which is no layer of this encoder")
    rows = zip(found.names, *(column.tolist() for column in found[1:]), strict=True)
    return tuple(LayerDamage(layer=name, vulnerability=v, own=o, features=f, chosen=c) for name, v, o, f, c in rows)
