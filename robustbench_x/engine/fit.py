"""`rbx fit` as a function: one training, of an attack, a defence or an encoder, from names to an artefact on disk."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_x.data.dataset import open_dataset
from robustbench_x.encoders.hardened import files_behind
from robustbench_x.engine.progress import Progress, Silent
from robustbench_x.engine.run import resolve_device
from robustbench_x.engine.supply import Supplied, Supply
from robustbench_x.errors import ConfigError, SourceError, UnknownNameError, UsageError
from robustbench_x.fitting.artifact import read_artifact, write_artifact
from robustbench_x.fitting.harden import find_inner
from robustbench_x.hardening import HardeningSpec
from robustbench_x.plugin import AttackSpec, DefenseSpec
from robustbench_x.registry import Registry
from robustbench_x.threat import ThreatModel
from robustbench_x.world import Torchrun, open_world, processes

__all__ = ["FitRequest", "fit_plugin"]

_SAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """What to train on what. `samples` surrogate images are drawn by `seed`; `resume` goes on where it stopped.

    A hardening without an attack takes a `threat` of eps 0 and no `surrogate`. `stream` leaves the images in their
    files; `samples` None is all of them then, and else 256. `losses` is a file for those of every step, as JSON lines,
    and `every` the seconds between two checkpoints.
    """

    plugin: str
    encoder: str | None
    threat: ThreatModel
    out: Path
    params: dict[str, Any]
    surrogate: str | None = None
    samples: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    resume: bool = True
    allow_pickle: bool = False
    stream: bool = False
    losses: Path | None = None
    every: float = 20.0


def fit_plugin(request: FitRequest, registry: Registry, progress: Progress | None = None) -> Supplied:
    """Trains what an attack learns, or hardens the encoder, and writes the artefact to `request.out`.

    Under `torchrun` every process calls this; an attack that `scales` shares its batch among them, the first writes.

    Raises:
        UsageError: The plugin has nothing to train, or a source, parameter or budget is wrong.
        SampleError: The training failed.
    """
    spec = _trainable(registry, request.plugin)
    _check_budget(request, spec)
    _check_scale(request, spec)
    for_one = not isinstance(spec, DefenseSpec) or spec.per_encoder
    if request.encoder is None and for_one:
        raise UsageError(f"{spec.name} is fitted on one encoder; name it with --encoder")
    if request.encoder is not None and not for_one:
        raise UsageError(f"{spec.name} serves every encoder alike; leave --encoder out")
    if request.out.suffix != ".safetensors":
        raise UsageError(f"--out {request.out}: an artefact is a .safetensors file")
    _check_out(request.out)
    supply = _make_supply(request, registry, progress or Silent())
    if isinstance(spec, DefenseSpec):
        found = _defending(request, spec, supply)
    else:
        train = _hardening if isinstance(spec, HardeningSpec) else _learning
        found = train(request, spec, supply)  # type: ignore[arg-type]  # each gets its own kind
    if supply.world.rank == 0:
        write_artifact(request.out, found.artifact)
    return found


def _learning(request: FitRequest, spec: AttackSpec, supply: Supply) -> Supplied:
    """What an attack learns."""
    if request.threat.norm not in spec.norms:
        raise ConfigError(f"attack {spec.name} has no norm '{request.threat.norm}'; it has {', '.join(spec.norms)}")
    for name in ("artifact", "fit_encoder"):
        if name in request.params:
            raise ConfigError(f"{spec.name}.{name} is for an audit; rbx fit makes the artefact, on --encoder")
    attack = spec.build(request.params)
    return supply.artifact(spec, attack, supply.load(_named(request)), request.threat)


def _defending(request: FitRequest, spec: DefenseSpec, supply: Supply) -> Supplied:
    """What a defence learns."""
    if "artifact" in request.params:
        raise ConfigError(f"{spec.name}.artifact is for an audit; rbx fit makes the artefact")
    defense = spec.build({**request.params, "artifact": ""})
    return supply.defense(spec, defense, None if request.encoder is None else supply.load(request.encoder))


def _named(request: FitRequest) -> str:
    assert request.encoder is not None, "checked at the start"
    return request.encoder


def _hardening(request: FitRequest, spec: HardeningSpec, supply: Supply) -> Supplied:
    """The weights of a hardened encoder."""
    encoder = _named(request)
    if any(path.resolve() == request.out.resolve() for path in files_behind(encoder)):
        raise UsageError(
            f"--out {request.out}: {encoder} is read from this file, and what is made of it refers to it; name another"
        )
    hardening = spec.build(request.params)
    inner = find_inner(supply.registry, hardening, request.threat) if spec.attacked else None
    return supply.hardened(spec, hardening, inner, supply.load(encoder), request.threat)


def _check_budget(request: FitRequest, spec: AttackSpec | HardeningSpec | DefenseSpec) -> None:
    """Refuses to train without a budget what needs one, and to take one, or images, for what would not use them."""
    if isinstance(spec, HardeningSpec) and not spec.attacked:
        if request.threat.eps:
            raise ConfigError(f"{spec.name} makes no adversarial image, so it has no budget; leave --eps out")
        if request.surrogate is not None:
            raise ConfigError(f"{spec.name} looks at no image; leave --surrogate out")
    elif not isinstance(spec, DefenseSpec) and request.threat.radius == 0:
        raise ConfigError("eps is 0: there is nothing to train")


def _check_scale(request: FitRequest, spec: AttackSpec | HardeningSpec | DefenseSpec) -> None:
    """Refuses several processes, and streams, where they would be of no use."""
    if processes() > 1 and not getattr(spec, "scales", False):
        raise UsageError(f"{spec.name} is trained in one process; start it without torchrun")
    if request.stream and not isinstance(spec, AttackSpec):
        raise UsageError(f"{spec.name} takes its images into memory; leave --stream out")


def _check_out(out: Path) -> None:
    """Refuses to overwrite anything but an artefact, before hours are spent."""
    if out.exists():
        try:
            read_artifact(out)
        except SourceError as error:
            raise UsageError(
                f"--out {out}: this is no artefact of rbx fit, so it is left alone; name another"
            ) from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: the folder cannot be made ({error.strerror})") from error
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out {out}: the folder cannot be written to")


def _trainable(registry: Registry, name: str) -> AttackSpec | HardeningSpec | DefenseSpec:
    """The attack, hardening or defence called `name`, which must have something to train.

    Raises:
        UnknownNameError: There is none of that name.
        UsageError: It has nothing to train.
    """
    kinds = (registry.attacks, registry.hardenings, registry.defenses)
    known = [spec.name for kind in kinds for spec in kind.values() if getattr(spec, "fits", True)]
    for kind in kinds:
        if name in kind:
            if name not in known:
                raise UsageError(f"{name} has nothing to train; rbx fit takes {', '.join(known)}")
            return kind[name]
    raise UnknownNameError("attack, hardening or defense", name, [n for kind in kinds for n in kind])


def _make_supply(request: FitRequest, registry: Registry, progress: Progress) -> Supply:
    """Where its trainings come from."""
    if request.precision not in ("fp32", "bf16"):
        raise ConfigError(f"--precision {request.precision}: choose fp32 or bf16")
    samples = _SAMPLES if request.samples is None and not request.stream else request.samples
    world = open_world(resolve_device(request.device))
    return Supply(
        registry=registry,
        open_dataset=lambda source: open_dataset(source, registry, seed=request.seed),
        surrogate=request.surrogate,
        samples=samples,
        seed=request.seed,
        device=world.device if isinstance(world, Torchrun) else resolve_device(request.device),
        progress=progress,
        bf16=request.precision == "bf16",
        allow_pickle=request.allow_pickle,
        fresh=not request.resume,
        stream=request.stream,
        world=world,
        losses=request.losses,
        every=request.every,
    )
