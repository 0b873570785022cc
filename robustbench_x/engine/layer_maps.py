"""The layer maps that the attacks of a run made of each encoder, gathered for the report."""

from collections.abc import Sequence

from robustbench_x.provenance import LayerMapInfo
from robustbench_x.result import CellResult, EncoderInfo

__all__ = ["with_layer_maps"]


def with_layer_maps(info: EncoderInfo, cells: Sequence[CellResult]) -> EncoderInfo:
    """`info` with the layer map of every artefact that `cells` on this encoder were attacked with, once each."""
    maps = {
        (cell.attack, cell.fit.sha256, cell.fit.threat, cell.fit.defense, cell.fit.knowledge): LayerMapInfo(
            attack=cell.attack,
            threat=cell.fit.threat,
            defense=cell.fit.defense,
            knowledge=cell.fit.knowledge,
            surrogate=cell.fit.surrogate,
            layers=cell.fit.layers,
        )
        for cell in cells
        if cell.encoder == info.source
        and cell.fit is not None
        and cell.fit.layers
        # Of another encoder's layers this one's report says nothing.
        and cell.fit.encoder_sha256 == info.sha256
    }
    return info.model_copy(update={"layer_vulnerability": tuple(maps.values())})
