"""`rbx audit`: run an audit, print the answer, leave with its exit code."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from robustbench_x.config import AuditConfig

__all__ = ["audit"]


def audit(
    config: Annotated[Path | None, typer.Argument(help="Audit file; without one, the embedded default runs.")] = None,
    encoder: Annotated[list[str] | None, typer.Option("--encoder", "-e", help="Encoder source; repeatable.")] = None,
    head: Annotated[list[str] | None, typer.Option("--head", "-H", help="Head; repeatable.")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", "-d", help="Data source; repeatable.")] = None,
    surrogate: Annotated[str | None, typer.Option(help="Unlabelled images an encoder-level attacker owns.")] = None,
    attack: Annotated[list[str] | None, typer.Option("--attack", "-a", help="Attack; repeatable.")] = None,
    defense: Annotated[
        list[str] | None, typer.Option("--defense", "-D", help="Defence; repeatable. none: no defence.")
    ] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Budget in [0, 1] units, e.g. 8/255; repeatable.")] = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or patch.")] = None,
    samples: Annotated[int | None, typer.Option(help="Evaluated images per data set, stratified.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Images per batch, or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16, for the attacks; verdicts are fp32.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides subsets, heads and random starts.")] = None,
    mode: Annotated[str | None, typer.Option(help="verdict (fooled images leave the batch) or exhaustive.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<date>-<time>-<encoder>.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Gate policy to judge the result by.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Run that the policy's baseline rule compares with.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Run every check; unreliable evaluations end with exit code 4.")
    ] = False,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="Attack every defence with the whole ladder, from oblivious to full.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run of the same audit.")] = True,
    shard: Annotated[str | None, typer.Option(help="Evaluate share i of n, e.g. 1/4.")] = None,
    engine: Annotated[str, typer.Option(help="local; ray is not available in this version.")] = "local",
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="attack.param=value, e.g. pgd.steps=50; repeatable.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Let checkpoints run code while loading. Only files you trust.")
    ] = False,
) -> None:
    """Attack encoders through their heads, judge the result, and answer: is it safe to ship?"""
    from robustbench_x.cli._run import RunRequest, run_and_report
    from robustbench_x.errors import UsageError

    if engine != "local":
        raise UsageError(f"--engine {engine}: this version has only the local engine")
    flags = {
        "surrogate": surrogate, "eps": eps or None, "norm": norm, "samples": samples, "batch_size": _batch(batch_size),
        "device": device, "precision": precision, "seed": seed, "mode": mode, "shard": shard,
        "allow_pickle": allow_pickle or None, "ladder": ladder or None, "checks": "all" if strict else None,
    }  # fmt: skip
    final = _configure(config, encoder, head, data, attack, defense, flags, param or [])
    request = RunRequest(
        config=final,
        out=out,
        policy=policy,
        baseline=baseline,
        strict=strict,
        resume=resume,
        command="rbx " + " ".join(sys.argv[1:]),
    )
    raise typer.Exit(run_and_report(request))


def _batch(value: str | None) -> int | str | None:
    return int(value) if value is not None and value.isdecimal() else value


def _configure(
    path: Path | None,
    encoder: list[str] | None,
    head: list[str] | None,
    data: list[str] | None,
    attack: list[str] | None,
    defense: list[str] | None,
    flags: Mapping[str, object],
    params: list[str],
) -> "AuditConfig":
    from robustbench_x.config import default_config, load_config, override

    base = load_config(path) if path is not None else default_config()
    return override(
        base,
        from_file=path is not None,
        encoder=encoder,
        head=head,
        data=data,
        attack=attack,
        defense=defense,
        settings={name: value for name, value in flags.items() if value is not None},
        params=params,
    )
