"""`rbx craft`: adversarial versions of the images in a folder."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["craft"]


def craft(
    attack: Annotated[str, typer.Argument(help="An attack that needs no head: noise, embed, advencoder, ...")],
    images: Annotated[Path, typer.Option(help="Folder of images, of any depth.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNGs and manifest.json; new or empty.")],
    encoder: Annotated[str, typer.Option("--encoder", "-e", help="Encoder source.")],
    artifact: Annotated[str | None, typer.Option(help="What rbx fit wrote, or shipped; else it is fitted now.")] = None,
    targets: Annotated[
        Path | None, typer.Option(help="Image, or folder of images in turns, to aim at (anyattack, ...).")
    ] = None,
    target_text: Annotated[str | None, typer.Option(help="What the targets show, for attackvlm_it.")] = None,
    surrogate: Annotated[str | None, typer.Option(help="Images to fit on; default packaged:crops.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Surrogate images drawn by the seed.")] = 256,
    norm: Annotated[str, typer.Option(help="linf, l2 or patch.")] = "linf",
    eps: Annotated[str | None, typer.Option(help="Budget; default 10/255, or 0.03 of the area for a patch.")] = None,
    placement: Annotated[str, typer.Option(help="Where a patch sits: a corner, center or random.")] = "bottom-right",
    seed: Annotated[int, typer.Option(help="Decides what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    param: Annotated[list[str] | None, typer.Option("--param", "-p", help="name=value, e.g. steps=50.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Let checkpoints run code while loading. Only files you trust.")
    ] = False,
) -> None:
    """Write adversarial PNGs of a folder's images, at the encoder's input size, with a manifest."""
    from robustbench_x.cli._training import run_craft, threat_from
    from robustbench_x.config import plugin_params
    from robustbench_x.engine.craft_folder import CraftRequest

    params = plugin_params(param or [], attack) | ({} if artifact is None else {"artifact": artifact})
    request = CraftRequest(
        attack=attack,
        images=images,
        out=out,
        encoder=encoder,
        threat=threat_from(norm, eps, placement),
        params=params,
        targets=targets,
        target_text=target_text,
        surrogate=surrogate,
        samples=samples,
        seed=seed,
        device=device,
        allow_pickle=allow_pickle,
    )
    raise typer.Exit(run_craft(request))
