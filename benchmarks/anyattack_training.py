"""Steps per second of the training of anyattack beside the published loop, written plainly, in one run and in turn.

    python benchmarks/anyattack_training.py [--device cpu] [--encoder SOURCE] [--batch 32] [--rounds 5]

Both have the same encoder, decoder, images and K = 5, and no augmentation. The plain loop is what one writes from the
paper: targets embedded without gradients, noise, K passes of the encoder over shuffled images, their mean, InfoNCE at
a falling temperature, AdamW under a restarting cosine. Ours is the trainer as `rbx fit` runs it, checks included.
"""

import argparse
import io
import itertools
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_x.data.dataset import Item, draw_subset, open_dataset
from robustbench_x.encoders.encoder import Encoder, Preprocessing
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine.run import resolve_device
from robustbench_x.fitting import FitJob, Ground, Pool, make_pool
from robustbench_x.fitting.ground import device_name, stream_pool
from robustbench_x.fitting.loop import batch_index
from robustbench_x.registry import load_registry
from robustbench_x.threat import ThreatModel
from robustbench_x.views import Meter
from robustbench_x_attacks.anyattack.decoder import make_decoder

EPS, K, IMAGES = 16 / 255, 5, 512
Step = Callable[[int], object]


Batches = Callable[[int], Tensor]


def plain_step(encoder: Encoder, batches: Batches, device: torch.device) -> Step:
    """The published loop, on bytes `(batch, 3, H, W)`."""
    decoder = make_decoder("compact", width=encoder.feature_dim, size=encoder.input_size, seed=0).to(device).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=5000)

    def step(number: int) -> float:
        images = batches(number).to(device).float().div(255)
        with torch.no_grad():
            targets = encoder(images)
        noise = decoder(targets).clamp(-EPS, EPS)
        seen = []
        for _ in range(K):
            order = torch.randperm(len(images), device=device)
            seen.append(encoder((images[order] + noise).clamp(0, 1)))
        features = torch.stack(seen).mean(dim=0)
        temperature = 0.07 ** (min(number, 10_000) / 10_000)
        logits = F.normalize(targets, dim=1) @ F.normalize(features, dim=1).T / temperature
        loss = F.cross_entropy(logits, torch.arange(len(images), device=device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        return float(loss.detach())

    return step


def in_memory(levels: Tensor, batch: int) -> Batches:
    """Shuffled images, all decoded before."""
    return lambda number: levels[batch_index(number, batch=batch, pool=len(levels), seed=0)]


@final
class Decoded(torch.utils.data.Dataset[Tensor]):
    """Images decoded when asked for."""

    def __init__(self, items: Sequence[Item], preprocessing: Preprocessing) -> None:
        self.items, self.preprocessing = items, preprocessing

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> Tensor:
        return self.preprocessing(self.items[place].load()).mul(255).round().to(torch.uint8)


def loaded(items: Sequence[Item], preprocessing: Preprocessing, batch: int) -> Batches:
    """Shuffled images by torch's data loader with two worker processes, which start over when they are through."""
    loader = torch.utils.data.DataLoader(
        Decoded(items, preprocessing), batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    stream = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda number: next(stream)


def our_step(encoder: Encoder, pool: Pool, batch: int, device: torch.device, **params: object) -> Step:
    """The step of our trainer, on images in memory or in shards."""
    spec = load_registry().attacks["anyattack"]
    attack = spec.build({"batch": batch, "steps": 10_000, "k": K, "augment": False, **params})
    ground = Ground(public=encoder, pool=pool, threat=ThreatModel(eps=EPS), seed=0, device=device)
    view = FitJob(spec=spec, attack=attack, ground=ground).view(Meter())
    trainer = attack.trainer(view)

    def step(number: int) -> object:
        if pool.stream is None:
            return trainer.step(number, batch_index(number, batch=batch, pool=len(pool), seed=0))
        pool.stream.expect(pool.stream.index(number + 2, batch=batch, seed=0))
        return trainer.step(number, pool.stream.index(number, batch=batch, seed=0))

    return step


def write_shards(folder: Path, items: tuple[Item, ...]) -> str:
    """`items` as JPEGs in shards of 128; the source that opens them."""
    for start in range(0, len(items), 128):
        with tarfile.open(folder / f"s-{start // 128:04d}.tar", "w") as tar:
            for number, item in enumerate(items[start : start + 128], start=start):
                file = io.BytesIO()
                image: PIL.Image.Image = item.load().convert("RGB")
                image.save(file, "jpeg", quality=90)
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = file.tell()
                file.seek(0)
                tar.addfile(info, file)
    return f"wds:{folder}/s-*.tar"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoder", default="packaged:efficientnet_lite0?size=64")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each contender in a round")
    chosen = parser.parse_args()
    device, registry, batch = resolve_device(chosen.device), load_registry(), chosen.batch
    encoder = load_encoder(chosen.encoder, registry).encoder.to(device)
    items = draw_subset(open_dataset("packaged:crops", registry).test, IMAGES, seed=0)
    pool = make_pool("packaged:crops", items, encoder.preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        shards = open_dataset(write_shards(Path(folder), items), registry).test
        streamed = stream_pool("wds", shards, encoder.preprocessing, "")
        contenders: dict[str, Step] = {
            "published loop, written plainly": plain_step(encoder, in_memory(pool.levels, batch), device),
            "ours, mode=compat": our_step(encoder, pool, batch, device, mode="compat"),
            "ours, mode=fixed": our_step(encoder, pool, batch, device),
            "published loop, DataLoader on shards": plain_step(
                encoder, loaded(shards, encoder.preprocessing, batch), device
            ),
            "ours, mode=fixed, streamed from shards": our_step(encoder, streamed, batch, device),
            f"ours, mode=fixed, chunk={batch // 4}": our_step(encoder, pool, batch, device, chunk=batch // 4),
        }
        seconds = _measure(contenders, device, chosen.rounds, chosen.steps)
    _print(seconds, chosen.steps, f"{device_name(device)}, torch {torch.__version__}, {platform.machine()}", chosen)


def _measure(contenders: dict[str, Step], device: torch.device, rounds: int, steps: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, step in contenders.items():
            started = time.perf_counter()
            for number in range(turn * steps, (turn + 1) * steps):
                step(number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _print(seconds: dict[str, list[float]], steps: int, where: str, chosen: argparse.Namespace) -> None:
    base = next(iter(seconds.values()))
    print(f"{where}; {chosen.encoder}, batch {chosen.batch}, K {K}, {len(base)} rounds of {steps} steps in turn\n")
    print("| loop | steps per second, median (best) | beside the published loop, median of the rounds |")
    print("|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(plain / own for plain, own in zip(base, times, strict=True))
        print(f"| {name} | {steps / statistics.median(times):.3f} ({steps / min(times):.3f}) | {ratio:.2f} |")


if __name__ == "__main__":
    main()
