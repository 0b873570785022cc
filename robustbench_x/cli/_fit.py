"""`rbx fit`: train what an attack or a defence learns, or harden an encoder, into an artefact with its provenance."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["fit"]


def fit(
    plugin: Annotated[
        str, typer.Argument(help="An attack or a defense that is trained first (advencoder, raw_isp), or a hardening.")
    ],
    out: Annotated[Path, typer.Option(help="The artefact to write, a .safetensors file.")],
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", "-e", help="Encoder source: trained on, or hardened. None for raw_isp."),
    ] = None,
    surrogate: Annotated[
        str | None, typer.Option(help="Unlabelled images (a defense: the defender's own); default packaged:crops.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Surrogate images or patches, drawn by the seed; default 256, of a stream all."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Leave the images in their files and decode them as they are needed.")
    ] = False,
    norm: Annotated[str, typer.Option(help="linf or patch; l2 for a hardening whose attack has it.")] = "linf",
    eps: Annotated[
        str | None, typer.Option(help="Budget; default 10/255, a hardening's own, or 0.03 of the area for a patch.")
    ] = None,
    placement: Annotated[str, typer.Option(help="Where a patch sits: a corner, center or random.")] = "bottom-right",
    seed: Annotated[int, typer.Option(help="Decides images, start and batches.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")] = "fp32",
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted training; reuse a finished one.")] = True,
    checkpoint_every: Annotated[float, typer.Option(min=0, help="Seconds between two checkpoints.")] = 20.0,
    losses: Annotated[Path | None, typer.Option(help="A .jsonl file for the losses of every step.")] = None,
    param: Annotated[list[str] | None, typer.Option("--param", "-p", help="name=value, e.g. steps=500.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Let checkpoints run code while loading. Only files you trust.")
    ] = False,
) -> None:
    """Train what an attack or a defense learns, or harden an encoder on an attack's images.

    rbx audit takes what was learned as -p NAME.artifact=FILE, and a hardened encoder as -e hardened:FILE.
    """
    from robustbench_x.cli._training import fit_threat, run_fit
    from robustbench_x.config import plugin_params
    from robustbench_x.engine.fit import FitRequest

    request = FitRequest(
        plugin=plugin,
        encoder=encoder,
        threat=fit_threat(plugin, norm, eps, placement),
        out=out,
        params=plugin_params(param or [], plugin),
        surrogate=surrogate,
        samples=samples,
        seed=seed,
        device=device,
        precision=precision,
        resume=resume,
        allow_pickle=allow_pickle,
        stream=stream,
        losses=losses,
        every=checkpoint_every,
    )
    run_fit(request)
