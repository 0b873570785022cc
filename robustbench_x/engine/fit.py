"""`rbx fit` as a function: one training, of an attack or of an encoder, from names to an artefact on disk."""

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
from robustbench_x.plugin import AttackSpec
from robustbench_x.registry import Registry
from robustbench_x.threat import ThreatModel

__all__ = ["FitRequest", "fit_plugin"]


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """What to train on what. `samples` surrogate images are drawn by `seed`; `resume` goes on where it stopped."""

    plugin: str
    encoder: str
    threat: ThreatModel
    out: Path
    params: dict[str, Any]
    surrogate: str | None = None
    samples: int = 256
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    resume: bool = True
    allow_pickle: bool = False


def fit_plugin(request: FitRequest, registry: Registry, progress: Progress | None = None) -> Supplied:
    """Trains what an attack learns, or hardens the encoder, and writes the artefact to `request.out`.

    Raises:
        UsageError: The plugin has nothing to train, or a source, parameter or budget is wrong.
        SampleError: The training failed.
    """
    spec = _trainable(registry, request.plugin)
    if request.threat.radius == 0:
        raise ConfigError("eps is 0: there is nothing to train")
    if request.out.suffix != ".safetensors":
        raise UsageError(f"--out {request.out}: an artefact is a .safetensors file")
    _check_out(request.out)
    supply = _make_supply(request, registry, progress or Silent())
    train = _hardening if isinstance(spec, HardeningSpec) else _learning
    found = train(request, spec, supply)  # type: ignore[arg-type]  # each gets its own kind
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
    return supply.artifact(spec, attack, supply.load(request.encoder), request.threat)


def _hardening(request: FitRequest, spec: HardeningSpec, supply: Supply) -> Supplied:
    """The weights of a hardened encoder."""
    if any(path.resolve() == request.out.resolve() for path in files_behind(request.encoder)):
        raise UsageError(
            f"--out {request.out}: {request.encoder} is read from this file, and what is made of it refers to it; "
            "name another"
        )
    hardening = spec.build(request.params)
    inner = find_inner(supply.registry, hardening, request.threat)
    return supply.hardened(spec, hardening, inner, supply.load(request.encoder), request.threat)


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


def _trainable(registry: Registry, name: str) -> AttackSpec | HardeningSpec:
    """The hardening called `name`, or the attack, which must have something to train.

    Raises:
        UnknownNameError: There is none of that name.
        UsageError: It has nothing to train.
    """
    if name in registry.hardenings:
        return registry.hardenings[name]
    if name not in registry.attacks:
        raise UnknownNameError("attack or hardening", name, [*registry.attacks, *registry.hardenings])
    spec = registry.attacks[name]
    if not spec.fits:
        known = [other.name for other in registry.attacks.values() if other.fits]
        raise UsageError(f"{name} has nothing to train; rbx fit takes {', '.join([*known, *registry.hardenings])}")
    return spec


def _make_supply(request: FitRequest, registry: Registry, progress: Progress) -> Supply:
    """Where its trainings come from."""
    if request.precision not in ("fp32", "bf16"):
        raise ConfigError(f"--precision {request.precision}: choose fp32 or bf16")
    return Supply(
        registry=registry,
        open_dataset=lambda source: open_dataset(source, registry, seed=request.seed),
        surrogate=request.surrogate,
        samples=request.samples,
        seed=request.seed,
        device=resolve_device(request.device),
        progress=progress,
        bf16=request.precision == "bf16",
        allow_pickle=request.allow_pickle,
        fresh=not request.resume,
    )
