"""AnyAttack beside the iterative attacks that aim: docs/results/anyattack.md.

    python benchmarks/anyattack.py --work DIR [--only NAME] [--artifact FILE] [--write]

Every run is an audit into a folder under DIR, so a killed one goes on where it stopped; `--write` makes the page from
what is there. Everything comes from Python packages.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import anyattack_page
import torch
import torch.nn.functional as F
from advencoder import Says
from torch import Tensor

from robustbench_x.config import AuditConfig
from robustbench_x.data.dataset import draw_subset, open_dataset
from robustbench_x.encoders.encoder import Encoder
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine import run_audit
from robustbench_x.engine.run import resolve_device
from robustbench_x.engine.supply import Supply
from robustbench_x.judge import admit
from robustbench_x.randomness import SampleRandom
from robustbench_x.registry import Registry, load_registry
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderHandle, EncoderView, ImageView, Meter

SURROGATE = "packaged:efficientnet_lite0?size=96"
VICTIMS: dict[str, tuple[dict[str, Any], int]] = {
    "digits": ({"encoder": SURROGATE, "head": ["linear", "retrieval"], "data": "packaged:digits"}, 30),
    "photos": ({"encoder": "packaged:efficientnet_lite0", "head": "native", "data": "packaged:photos"}, 16),
    "conse": ({"encoder": "packaged:conse_minilm", "head": ["captions", "zero_shot"], "data": "packaged:photos"}, 8),
    "dinov2": ({"encoder": "packaged:dinov2_vits14?size=98", "head": "linear", "data": "packaged:digits"}, 10),
}
"""The decoder's own surrogate, the same network at another size, an image-text encoder over it, and another network."""
STEPS = (10, 100, 300)
"""Of attackvlm_ii; in the audits the first two, as 300 steps at 224 pixels take a processor hours."""
FOUND = "found"
"""What stage 1 trains: the target is found by its embedding among many. Measured here, as no audit has such a head."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", action="append", help="victims by name; all by default")
    parser.add_argument("--artifact", default="shipped", help="the decoder; the shipped one by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", action="store_true", help="write the page from what is there, and run nothing")
    parser.add_argument("--page", type=Path, default=Path("docs/results/anyattack.md"))
    given = parser.parse_args()
    for name in [] if given.write else given.only or (FOUND, *VICTIMS):
        print(name, flush=True)
        if name == FOUND:
            found(given.work / "found.json", given.artifact, given.device)
            continue
        config = audit(name, given.artifact, given.device)
        run_audit(config, given.work / name, command=" ".join(sys.argv), progress=Says())
    if given.write or not given.only:
        anyattack_page.write(given.page, given.work)


def audit(name: str, artifact: str, device: str) -> AuditConfig:
    """The audit of one victim at 8 and 16/255: the decoder, what only transfers, and what asks the victim's encoder."""
    target, samples = VICTIMS[name]
    elsewhere = target["encoder"] != SURROGATE
    decoder = {"name": "anyattack", "artifact": artifact, **({"fit_encoder": SURROGATE} if elsewhere else {})}
    attacks: list[dict[str, Any]] = [
        {"name": "noise"},
        decoder,
        *({"name": "attackvlm_ii", "label": f"attackvlm_ii, {n} steps", "steps": n} for n in STEPS[:2]),
        {"name": "m_attack", "steps": 30},
        {"name": "ssa_cwa", "steps": 5, "samples": 5},
    ]
    if name == "conse":
        attacks.append({"name": "attackvlm_it", "steps": 50})
    if name in ("conse", "dinov2"):
        attacks.append(
            {"name": "m_attack", "label": "m_attack, transfer", "steps": 30, "own": False, "encoders": SURROGATE}
        )
        attacks.append({"name": "xtransfer", "fit_encoder": SURROGATE, "steps": 100, "batch": 16})
    values = {
        "target": [target],
        "attack": attacks,
        "samples": samples,
        "eps": ["8/255", "16/255"],
        "device": device,
        "seed": 0,
    }
    return AuditConfig.model_validate(values)


def found(path: Path, artifact: str, asked: str) -> None:
    """How often the target's embedding is the nearest of all to the attacked image's, on the surrogate itself.

    Each image is aimed at the next one. `crops` are other crops of the photographs that the decoder was trained on,
    `photos` it has never seen.
    """
    device, registry = resolve_device(asked), load_registry()
    encoder = load_encoder(SURROGATE, registry).encoder.to(device)
    rows = []
    for data, count in (("packaged:crops", 40), ("packaged:photos", 20)):
        images = held_out(data, count, encoder).to(device)
        targets = images.roll(1, dims=0)
        for eps in (8 / 255, 16 / 255):
            contenders: list[tuple[str, str, dict[str, Any]]] = [
                ("noise", "noise", {}),
                ("anyattack", "anyattack", {"artifact": artifact}),
                *((f"attackvlm_ii, {n} steps", "attackvlm_ii", {"steps": n}) for n in STEPS),
            ]
            for label, name, params in contenders:
                spec, threat, meter = registry.attacks[name], ThreatModel(eps=eps), Meter()
                attack = spec.build(params)
                shared: dict[str, Any] = {
                    "inputs": images.clone(),
                    "threat": threat,
                    "random": SampleRandom(list(range(count)), device=device),
                    "exhaustive": True,
                }
                if spec.access == "none":
                    view: ImageView | EncoderView = ImageView(**shared)
                else:
                    handle = EncoderHandle(encoder, lambda pixels: pixels, meter)
                    learned = supply(registry, device).artifact(spec, attack, encoder, threat) if spec.fits else None
                    tensors = (
                        None if learned is None else {k: t.to(device) for k, t in learned.artifact.tensors.items()}
                    )
                    view = EncoderView(**shared, encoder=handle, targets=targets, artifact=tensors)
                started = time.perf_counter()
                made = admit(attack.run(view), images, threat).images
                seconds = (time.perf_counter() - started) / count
                rows.append(
                    {
                        "data": data,
                        "n": count,
                        "attack": label,
                        "eps": eps,
                        "hits": hits(encoder, made, targets),
                        "forwards": meter.forwards / count,
                        "backwards": meter.backwards / count,
                        "seconds": seconds,
                    }
                )
                print(rows[-1], flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def held_out(data: str, count: int, encoder: Encoder) -> Tensor:
    """Images that the shipped decoder was not trained on, `(count, 3, H, W)`."""
    dataset = open_dataset(data, load_registry())
    pool = dataset.train or dataset.test
    trained = {item.id for item in draw_subset(pool, 4000, seed=0)} if data == "packaged:crops" else set()
    others = [item for item in pool if item.id not in trained]
    return torch.stack([encoder.preprocessing(item.load()) for item in draw_subset(others, count, seed=1)])


@torch.no_grad()
def hits(encoder: Encoder, made: Tensor, targets: Tensor) -> int:
    """Images whose nearest target, by cosine of the features, is their own."""
    attacked, wanted = (
        F.normalize(torch.cat([encoder(part) for part in torch.split(images, 32)]), dim=1) for images in (made, targets)
    )
    nearest = (attacked @ wanted.T).argmax(dim=1).cpu()
    return int((nearest == torch.arange(len(made))).sum())


def supply(registry: Registry, device: torch.device) -> Supply:
    """Where the decoder comes from."""
    return Supply(
        registry=registry,
        open_dataset=lambda source: open_dataset(source, registry),
        surrogate=None,
        samples=256,
        seed=0,
        device=device,
        progress=Says(),
    )


if __name__ == "__main__":
    main()
