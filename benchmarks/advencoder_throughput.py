"""Samples per second of the fit loop beside a plain re-statement of the published training step, in one run."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_x.data.dataset import draw_subset, open_dataset
from robustbench_x.encoders.encoder import Encoder
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine.run import resolve_device
from robustbench_x.fitting import FitJob, Ground, make_pool
from robustbench_x.fitting.loop import batch_index
from robustbench_x.registry import load_registry
from robustbench_x.threat import ThreatModel
from robustbench_x.views import Meter
from robustbench_x_attacks.universal.generator import Generator

BATCH, NOISES, EPS = 64, 16, 10 / 255
SIZES = {"packaged:efficientnet_lite0?size=64": 64}


def measure(out: Path, *, device: str, rounds: int = 3, steps: int = 4) -> None:
    """Times both, round by round in turn, and writes the figures."""
    place = resolve_device(device)
    figures = {source: _compare(source, place, rounds, steps) for source in SIZES}
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    out.write_text(json.dumps({"device": name, "batch": BATCH, "noises": NOISES, "rows": figures}, indent=1))
    print(out.read_text())


def _compare(source: str, device: torch.device, rounds: int, steps: int) -> dict[str, Any]:
    registry = load_registry()
    encoder = load_encoder(source, registry).encoder.to(device)
    items = draw_subset(open_dataset("packaged:crops", registry).test, 256, seed=0)
    pool = make_pool("packaged:crops", items, encoder.preprocessing)
    images = pool.levels.to(device).float().div(255)
    spec = registry.attacks["advencoder"]
    seconds: dict[str, list[float]] = {"published step": [], "code": [], "best": []}
    plain = _Plain(encoder, SIZES[source], device)
    trainers = {}
    for name, params in (("code", {"setting": "code", "noises": NOISES}), ("best", {})):
        attack = spec.build({**params, "batch": BATCH, "steps": 10_000})
        ground = Ground(
            public=encoder, pool=pool, threat=ThreatModel(eps=EPS), seed=0, device=device, bf16=device.type == "cuda"
        )
        job = FitJob(spec=spec, attack=attack, ground=ground)
        trainers[name] = attack.trainer(job.view(Meter()))
    for number in range(rounds + 1):
        for name in seconds:
            started = time.perf_counter()
            for step in range(number * steps, (number + 1) * steps):
                index = batch_index(step, batch=BATCH, pool=len(images), seed=0)
                plain.step(images[index.to(device)]) if name == "published step" else trainers[name].step(step, index)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: steps * BATCH / min(times) for name, times in seconds.items()}


class _Plain:
    """The published step as it is described: both passes through the encoder, clean and adversarial."""

    def __init__(self, encoder: Encoder, size: int, device: torch.device) -> None:
        self.encoder = encoder
        self.size = size
        self.generator = Generator(size=(size, size), noises=NOISES, width=1024, seed=0).to(device).train()
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        self.mse = nn.MSELoss()

    def step(self, images: Tensor) -> None:
        with torch.enable_grad():
            noise = self.generator().clamp(-EPS, EPS)
            adversarial = (images + noise).clamp(0, 1)
            queries, keys = self.encoder(images), self.encoder(adversarial)
            logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / 0.1
            contrast = -F.cross_entropy(logits, torch.arange(len(images), device=images.device))
            high = self.mse(self._high(adversarial), self._high(images))
            loss = 5 * contrast - high + self.mse(adversarial, images)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def _high(self, images: Tensor) -> Tensor:
        axis = torch.arange(self.size, device=images.device) - self.size // 2
        keep = axis[:, None].square() + axis[None, :].square() >= (self.size / 8) ** 2
        shifted = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1)) * keep
        back: Tensor = torch.fft.ifft2(torch.fft.ifftshift(shifted, dim=(-2, -1))).real
        return back
