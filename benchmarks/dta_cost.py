"""Seconds per image of DTA, of PGD with as many steps, and of a pass cut off at each layer; ratios from one run."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_x.data.dataset import draw_subset, open_dataset
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine.run import resolve_device
from robustbench_x.fitting.job import device_name
from robustbench_x.randomness import SampleRandom
from robustbench_x.registry import load_registry
from robustbench_x.threat import ThreatModel
from robustbench_x.views import EncoderHandle, EncoderView, Meter, ModelHandle, WhiteboxView

IMAGES, STEPS, EPS = 8, 10, 4 / 255


def measure(out: Path, encoders: Sequence[str], *, device: str, rounds: int = 3) -> None:
    """Times everything, round by round in turn, and writes the best of each."""
    place = resolve_device(device)
    rows = {source: _one(source, place, rounds) for source in encoders}
    out.write_text(json.dumps({"device": device_name(place), "images": IMAGES, "steps": STEPS, "rows": rows}, indent=1))
    print(out.read_text())


def _one(source: str, device: torch.device, rounds: int) -> dict[str, Any]:
    registry = load_registry()
    encoder = load_encoder(source, registry).encoder.to(device)
    items = draw_subset(open_dataset("packaged:crops", registry).test, IMAGES, seed=0)
    inputs = torch.stack([encoder.preprocessing(item.load()) for item in items]).to(device)
    head = nn.Linear(encoder.feature_dim, 10).to(device).requires_grad_(False)
    shared: dict[str, Any] = {"inputs": inputs, "threat": ThreatModel(eps=EPS), "exhaustive": True}

    def run(name: str, **params: Any) -> Callable[[], object]:
        spec = registry.attacks[name]
        attack = spec.build({"steps": STEPS, **params})

        def once() -> object:
            random = SampleRandom(range(IMAGES), device=device)
            if spec.access == "encoder":
                handle = EncoderHandle(encoder, lambda images: images, Meter())
                return attack.run(EncoderView(**shared, random=random, encoder=handle))
            model = ModelHandle(lambda images: head(encoder(images)), Meter())
            labels = torch.zeros(IMAGES, dtype=torch.long, device=device)
            return attack.run(WhiteboxView(**shared, random=random, labels=labels, model=model, num_classes=10))

        return once

    jobs: dict[str, Callable[[], object]] = {"pgd": run("pgd"), "embed": run("embed")}
    jobs |= {f"dta at {layer}": run("dta", layers=layer) for layer in encoder.layers}
    jobs |= {f"pass to {layer}": _passes(encoder, inputs, layer) for layer in encoder.layers}
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[name] = min(best[name], (time.perf_counter() - started) / IMAGES)
    return {"layers": list(encoder.layers), "seconds": best}


def _passes(encoder: Any, inputs: Tensor, layer: str) -> Callable[[], object]:
    """One forward and backward pass as deep as `layer`."""

    def once() -> object:
        images = inputs.clone().requires_grad_(True)
        loss = encoder.tokens(images, [layer])[layer].spatial.square().mean()
        return torch.autograd.grad(loss, images)

    return once
