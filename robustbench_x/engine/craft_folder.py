"""`rbx craft` as a function: adversarial versions of a folder's images, with a manifest of what was done to each."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import PIL.Image
import torch
from torch import Tensor

from robustbench_x import __version__
from robustbench_x.data.dataset import Item, open_dataset, read_image
from robustbench_x.encoders.encoder import Encoder, LoadedEncoder
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine.handout import partner_handle, run_partners
from robustbench_x.engine.isolation import isolated
from robustbench_x.engine.progress import Progress, Silent
from robustbench_x.engine.run import resolve_device
from robustbench_x.engine.supply import Supplied, Supply
from robustbench_x.errors import ConfigError, DataError, UsageError
from robustbench_x.judge import admit, feature_cosine, measure, read_features
from robustbench_x.plugin import AttackSpec
from robustbench_x.randomness import SampleRandom, derive_seed
from robustbench_x.registry import Registry
from robustbench_x.store import write_atomically
from robustbench_x.threat import ThreatModel
from robustbench_x.victim import DefendedEncoder
from robustbench_x.views import EncoderHandle, EncoderView, ImageView, Meter

__all__ = ["CraftRequest", "craft_folder"]

_BATCH = 16
_BEGUN = ".unfinished"


@dataclass(frozen=True, kw_only=True)
class CraftRequest:
    """Which attack, on which images, against which encoder.

    `targets` is an image, or a folder of them, for an attack that aims: the images take turns, and no image is its own
    target. `target_text` says what they show.
    """

    attack: str
    images: Path
    out: Path
    encoder: str
    threat: ThreatModel
    params: dict[str, Any]
    surrogate: str | None = None
    targets: Path | None = None
    target_text: str | None = None
    samples: int = 256
    seed: int = 0
    device: str = "auto"
    allow_pickle: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class _Tools:
    """What every batch is made with. `aims` are the target images `(T, 3, H, W)` by name, in turns."""

    spec: AttackSpec
    attack: Any
    loaded: LoadedEncoder
    learned: Supplied | None
    partners: tuple[Encoder, ...]
    aims: tuple[tuple[str, Tensor], ...]
    device: torch.device


def craft_folder(request: CraftRequest, registry: Registry, progress: Progress | None = None) -> dict[str, Any]:
    """Writes a PNG per image, at the encoder's input size, and `manifest.json`; returns the manifest.

    What is written is rounded to 8 bits inside the budget, and every figure is measured on the rounded image. An image
    that cannot be read or attacked has an `error` and no file.

    Raises:
        UsageError: The attack needs a head or labels, the output folder holds something, or a name is wrong.
        SampleError: A training failed.
    """
    spec = registry.attacks[request.attack]
    if spec.access not in ("none", "encoder"):
        raise UsageError(f"{spec.name} needs access {spec.access}: a folder of images has no head; use rbx audit")
    if request.threat.norm not in spec.norms:
        raise ConfigError(f"attack {spec.name} has no norm '{request.threat.norm}'; it has {', '.join(spec.norms)}")
    if spec.aims != (request.targets is not None):
        wanted = "aims: name its targets with --targets" if spec.aims else "does not aim: drop --targets"
        raise UsageError(f"attack {spec.name} {wanted}")
    _check_out(request.out)
    attack, progress = spec.build(request.params), progress or Silent()
    items = open_dataset(f"images:{request.images}", registry).test
    device = resolve_device(request.device)
    loaded = load_encoder(request.encoder, registry, allow_pickle=request.allow_pickle)
    encoder = loaded.encoder.to(device)
    if loaded.text is not None:
        loaded.text.to(device)
    supply = _supply(request, registry, device, progress)
    fits = spec.fits and request.threat.radius > 0
    learned = supply.artifact(spec, attack, encoder, request.threat) if fits else None
    partners = tuple(supply.load(source) for source in run_partners(spec, attack, request.encoder))
    aims = _aims(request, encoder, registry)
    tools = _Tools(
        spec=spec, attack=attack, loaded=loaded, learned=learned, partners=partners, aims=aims, device=device
    )
    request.out.mkdir(parents=True, exist_ok=True)
    (request.out / _BEGUN).touch()
    progress.begin(len(items), 0)
    entries = []
    for start in range(0, len(items), _BATCH):
        entries += _batch(request, tools, items[start : start + _BATCH], start)
        progress.task(f"{spec.name} on {request.images}")
        progress.advance(len(items[start : start + _BATCH]))
    manifest = {
        "robustbench_x": __version__,
        "attack": spec.name,
        "params": spec.effective(request.params),
        "encoder": {"source": encoder.source, "sha256": encoder.sha256, "input_size": list(encoder.input_size)},
        "threat": {"norm": request.threat.norm, "eps": request.threat.eps, "placement": request.threat.placement},
        "seed": request.seed,
        "artifact": None if learned is None else learned.artifact.info(learned.origin).model_dump(mode="json"),
        "images": entries,
    }
    write_atomically(request.out / "manifest.json", json.dumps(manifest, indent=2, allow_nan=False) + "\n")
    (request.out / _BEGUN).unlink()
    return manifest


def _check_out(out: Path) -> None:
    """Takes a new folder, an empty one, or one that was left unfinished, whose images are made again."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _BEGUN).exists())):
        raise UsageError(f"--out {out}: name an empty or a new folder")


def _supply(request: CraftRequest, registry: Registry, device: torch.device, progress: Progress) -> Supply:
    """Where trainings and further encoders come from."""
    return Supply(
        registry=registry,
        open_dataset=lambda source: open_dataset(source, registry, seed=request.seed),
        surrogate=request.surrogate,
        samples=request.samples,
        seed=request.seed,
        device=device,
        progress=progress,
        allow_pickle=request.allow_pickle,
    )


def _aims(request: CraftRequest, encoder: Encoder, registry: Registry) -> tuple[tuple[str, Tensor], ...]:
    """The target images with their names.

    Raises:
        DataError: One of them cannot be read.
    """
    if request.targets is None:
        return ()
    if request.targets.is_file():
        found = {request.targets.name: read_image(request.targets, name=str(request.targets))}
    else:
        found = {item.id: item.load() for item in open_dataset(f"images:{request.targets}", registry).test}
    return tuple((name, encoder.preprocessing(image)) for name, image in found.items())


def _batch(request: CraftRequest, tools: _Tools, items: tuple[Item, ...], first: int) -> list[dict[str, Any]]:
    """Manifest entries of a few images, the `first` of which has this number, whose files are written."""
    entries: dict[str, dict[str, Any]] = {item.id: {"source": item.id} for item in items}
    encoder, pixels = tools.loaded.encoder, {}
    aims = {}
    for number, item in enumerate(items, first):
        try:
            image = encoder.preprocessing(item.load())
        except DataError as error:
            entries[item.id]["error"] = str(error)
            continue
        if tools.aims:
            aim = _aim(tools.aims, number, image)
            if aim is None:
                entries[item.id]["error"] = "its only target is the image itself"
                continue
            entries[item.id]["target"], aims[item.id] = aim
        pixels[item.id] = image
    if not pixels:
        return list(entries.values())
    inputs = torch.stack(list(pixels.values())).to(tools.device)
    targets = torch.stack([aims[name] for name in pixels]).to(tools.device) if aims else None
    try:
        images, errors = _attack(request, tools, list(pixels), inputs, targets)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it becomes the error of these images
        images, errors = inputs, [f"{type(error).__name__}: {error}"] * len(inputs)
    measured = measure(images, inputs)
    victim = DefendedEncoder(encoder=encoder)
    cosine = feature_cosine(*(read_features(x, victim, draws=1, seed=0) for x in (images, inputs)))
    for i, name in enumerate(pixels):
        if errors[i] is not None:
            entries[name]["error"] = errors[i]
            continue
        file = request.out / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        levels = images[i].mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        PIL.Image.fromarray(levels).save(file)
        entries[name] |= {
            "file": f"{name}.png",
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "linf": float(measured.linf[i]),
            "l2": float(measured.l2[i]),
            "ssim": float(measured.ssim[i]),
            "feature_cosine": None if cosine[i].isnan() else float(cosine[i]),
        }
    return list(entries.values())


def _aim(aims: tuple[tuple[str, Tensor], ...], turn: int, image: Tensor) -> tuple[str, Tensor] | None:
    """The target whose turn it is, or the next one that is not `image` itself; None where there is none."""
    turns = (aims[(turn + i) % len(aims)] for i in range(len(aims)))
    return next((aim for aim in turns if not torch.equal(aim[1], image)), None)


def _attack(
    request: CraftRequest, tools: _Tools, names: list[str], inputs: Tensor, targets: Tensor | None
) -> tuple[Tensor, list[str | None]]:
    """The attack's images, judged admissible and rounded to 8 bits inside the budget."""
    spec, learned = tools.spec, tools.learned
    seeds = [derive_seed(request.seed, spec.name, name) for name in names]
    random = SampleRandom(seeds, device=inputs.device)
    shared: dict[str, Any] = {"inputs": inputs.clone(), "threat": request.threat, "random": random, "exhaustive": True}
    if spec.access == "none":
        view: ImageView | EncoderView = ImageView(**shared)
    else:
        tensors = None if learned is None else {k: t.to(inputs.device) for k, t in learned.artifact.tensors.items()}
        handle = EncoderHandle(tools.loaded.encoder, lambda images: images, Meter(), text=tools.loaded.text)
        others = tuple(partner_handle(partner, Meter()) for partner in tools.partners)
        texts = None if request.target_text is None else (request.target_text,) * len(inputs)
        view = EncoderView(
            **shared, encoder=handle, artifact=tensors, partners=others, targets=targets, target_texts=texts
        )
    with isolated(random.seed, inputs.device):
        candidates = tools.attack.run(view)
    admitted = admit(candidates, inputs, request.threat)
    return request.threat.quantize(admitted.images, inputs), admitted.errors
