"""What is registered before any plugin: encoder sources, data sources and heads."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustbench_x.registry import Registry

__all__ = ["register_builtins"]


def register_builtins(registry: "Registry") -> None:
    """Registers everything this distribution ships outside its attack and defence plugins."""
    # Here, not at module level: importing this module must stay free of torch and timm.
    from robustbench_x.data import captioned, folder, fractal, images, wds
    from robustbench_x.data import packaged as packaged_data
    from robustbench_x.encoders import hardened, hub_models, open_clip_source, packaged, python_source, timm_source
    from robustbench_x.heads.catalogue import HEADS

    for encoder in (
        packaged.SOURCE,
        timm_source.SOURCE,
        hub_models.SOURCE,
        open_clip_source.SOURCE,
        python_source.SOURCE,
        hardened.make_source(registry),
    ):
        registry.add_encoder(encoder)
    for data in (packaged_data.SOURCE, folder.SOURCE, fractal.SOURCE, images.SOURCE, wds.SOURCE, captioned.SOURCE):
        registry.add_data(data)
    for head in HEADS:
        registry.add_head(head)
