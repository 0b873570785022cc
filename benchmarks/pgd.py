"""PGD beside a hand-written loop, torchattacks, foolbox and ART: seconds, robust accuracy and passes per image.

    python benchmarks/pgd.py [--images N] [--repeats R] [--threads T] [--device cpu|cuda] [--out FILE.md]

Everyone attacks the same frozen network in float32 with the same budget, step size, kind of random start and
one batch. The hand-written loop and the peers get a plain module without our range checks; ours runs behind the
view an audit hands out. Rounds are interleaved, so that a busy machine slows all alike, and the best round of
each counts. Candidates are judged alike, by a fresh forward pass after the same projection. On a shared machine
read the processor time, with `--threads 1`. Two cores need 10 minutes for `--images 8 --repeats 2 --threads 1`.

The peers come with `pip install 'robustbench-x[bench,torchattacks]'`; one that is missing keeps its row, which
says so. ART 1.20.1 changed no installed version here: it brought only itself and six.
"""

import argparse
import importlib.util
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from pgd_contenders import (
    APGD_ROWS,
    HAND,
    OURS_ALL,
    OURS_VERDICT,
    PGD_ROWS,
    SEED,
    Contender,
    Result,
    Task,
    Victim,
)

from robustbench_x.data.dataset import draw_subset, open_dataset
from robustbench_x.encoders.encoder import Encoder, Preprocessing, Tokens
from robustbench_x.encoders.source import load_encoder
from robustbench_x.heads.base import FittedHead
from robustbench_x.heads.build import build_head
from robustbench_x.judge import admit
from robustbench_x.registry import load_registry
from robustbench_x.threat import ThreatModel

PGD_EPS = 4 / 255
PGD_STEPS = (10, 50)
APGD_EPS = (0.25 / 255, 4 / 255)
APGD_STEPS = 10
LOOP_STEPS = 20
EXHAUSTIVE_AT_MOST = 1.05
SOONER_AT_LEAST = {10: 3.0, 50: 10.0}


def race(task: Task, contenders: Sequence[Contender], rounds: int, console: Console) -> list[Result]:
    """Every contender once per round, each round starting with another one."""
    results = {c.name: Result(c.name) for c in contenders}
    present = []
    for contender in contenders:
        if importlib.util.find_spec(contender.module) is None:
            results[contender.name].missing = f"not installed: pip install 'robustbench-x[{contender.extra}]'"
        else:
            present.append(contender)
    for index in range(rounds):
        shift = index % len(present)
        for contender in (*present[shift:], *present[:shift]):
            where = f"{task.victim.title}, {task.steps} steps, round {index + 1} of {rounds}: {contender.name}"
            console.print(where, style="dim", highlight=False)
            _measure(task, contender, results[contender.name])
    return list(results.values())


def _measure(task: Task, contender: Contender, result: Result) -> None:
    run = contender.prepare(task)
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    _wait(task)
    wall, cpu = time.perf_counter(), time.process_time()
    candidates = run.craft()
    _wait(task)
    result.seconds = min(result.seconds, time.perf_counter() - wall)
    result.cpu_seconds = min(result.cpu_seconds, time.process_time() - cpu)
    count = len(task.victim.images)
    result.forwards, result.backwards = run.meter.forwards / count, run.meter.backwards / count
    result.batches = run.batches
    result.robust_accuracy = _judge(task, candidates)


def _wait(task: Task) -> None:
    if task.victim.images.is_cuda:
        torch.cuda.synchronize()


@torch.no_grad()
def _judge(task: Task, candidates: Tensor) -> float:
    admitted = admit(candidates, task.victim.images, task.threat)
    if broken := [error for error in admitted.errors if error]:
        raise RuntimeError(f"{len(broken)} candidates cannot be judged: {broken[0]}")
    right = task.victim.logits(admitted.images).argmax(dim=1) == task.victim.labels
    return right.float().mean().item()


def load_victims(count: int, device: torch.device) -> list[Victim]:
    """EfficientNet-Lite0 on photographs and DINOv2-S on digits, `count` images of each at most."""
    return [
        _victim("packaged:efficientnet_lite0", "native", "packaged:photos", count, device),
        _victim("packaged:dinov2_vits14?size=98", "linear", "packaged:digits", count, device),
    ]


@final
class _Average(nn.Module):
    """A network that costs next to nothing, so that what is left is the loop."""

    layers: tuple[str, ...] = ()

    def pooled(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    def tokens(self, images: Tensor, layers: Sequence[str]) -> list[Tokens]:
        return []


def free_victim(count: int, device: torch.device) -> Victim:
    """Random images at 224 px in front of an average and a linear layer over 1,000 classes."""
    generator = torch.Generator().manual_seed(SEED)
    layer = nn.Linear(3, 1000)
    layer.load_state_dict(
        {"weight": torch.randn(1000, 3, generator=generator), "bias": torch.randn(1000, generator=generator)}
    )
    encoder = Encoder(source="average", backbone=_Average(), preprocessing=Preprocessing())
    return Victim(
        title=f"average of the pixels, {count} random images at 224 px",
        encoder=encoder.to(device),
        head=FittedHead(name="linear", layer=layer, num_classes=1000, aliases={}).to(device),
        images=torch.rand(count, 3, 224, 224, generator=generator).to(device),
        labels=torch.randint(1000, (count,), generator=generator).to(device),
    )


def _victim(source: str, head_name: Literal["native", "linear"], data: str, count: int, device: torch.device) -> Victim:
    registry = load_registry()
    loaded = load_encoder(source, registry)
    dataset = open_dataset(data, registry)
    if loaded.classifier is not None:
        loaded.classifier.to(device)
    loaded.encoder.to(device)
    head = build_head(
        head_name, loaded=loaded, dataset=dataset, registry=registry, seed=SEED, device=device, batch_size=64
    )
    items = draw_subset(dataset.test, count, seed=SEED)
    index = head.match(dataset.classes)[torch.tensor([item.label for item in items])]
    images = torch.stack([loaded.encoder.preprocessing(item.load()) for item in items])
    side = loaded.encoder.input_size[0]
    return Victim(
        title=f"{source.partition('?')[0]} at {side} px, {head_name} head, {len(items)} of {data}",
        encoder=loaded.encoder,
        head=head,
        images=images.to(device),
        labels=index.to(device),
    )


def _render(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> list[str]:
    """Prints a table and returns it as Markdown."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _rows(results: Sequence[Result], reference: Result) -> list[list[str]]:
    rows = []
    for r in results:
        if r.missing:
            rows.append([r.name, r.missing, *[""] * 6])
            continue
        rows.append(
            [
                r.name,
                f"{r.seconds:.2f}",
                f"{r.seconds / reference.seconds:.2f}",
                f"{r.cpu_seconds:.2f}",
                f"{r.cpu_seconds / reference.cpu_seconds:.2f}",
                f"{r.robust_accuracy:.2f}",
                f"{r.forwards:.2f}",
                f"{r.backwards:.2f}",
            ]
        )
    return rows


def _columns(reference: str) -> list[str]:
    return [
        "implementation",
        "seconds",
        f"x {reference}",
        "CPU seconds",
        f"x {reference} (CPU)",
        "robust accuracy",
        "forwards per image",
        "backwards per image",
    ]


def _targets(steps: int, results: Sequence[Result]) -> list[str]:
    """One sentence per target, wall clock first and processor time in brackets."""
    by_name = {r.name: r for r in results if not r.missing}
    hand, full, verdict = by_name[HAND], by_name[OURS_ALL], by_name[OURS_VERDICT]
    others = [r for r in by_name.values() if r.name not in (OURS_ALL, OURS_VERDICT)]
    ratio, cpu_ratio = full.seconds / hand.seconds, full.cpu_seconds / hand.cpu_seconds
    fastest = min(others, key=lambda r: r.seconds)
    sooner = fastest.seconds / verdict.seconds
    cpu_sooner = min(r.cpu_seconds for r in others) / verdict.cpu_seconds
    lowest = min(r.robust_accuracy for r in others)
    wanted = SOONER_AT_LEAST[steps]
    batches = ", ".join(map(str, verdict.batches))
    return [
        f"- Exhaustive: {ratio:.2f}x the hand-written loop (CPU {cpu_ratio:.2f}x); target at most "
        f"{EXHAUSTIVE_AT_MOST}x: {_held(ratio <= EXHAUSTIVE_AT_MOST)} "
        f"(CPU {_held(cpu_ratio <= EXHAUSTIVE_AT_MOST)}).",
        f"- Verdict: {sooner:.1f}x sooner than the fastest other, {fastest.name} (CPU {cpu_sooner:.1f}x); target "
        f"at least {wanted:g}x: {_held(sooner >= wanted)} (CPU {_held(cpu_sooner >= wanted)}).",
        f"- Robust accuracy {verdict.robust_accuracy:.2f} against the others' lowest {lowest:.2f}: "
        f"{_held(verdict.robust_accuracy <= lowest)}.",
        f"- Images in the batch at each forward pass of the verdict mode: {batches}.",
        "",
    ]


def _held(good: bool) -> str:
    return "held" if good else "MISSED"


def _setting(args: argparse.Namespace, command: str) -> list[str]:
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine() + " CPU"
    packages = ["torch", "timm", "torchattacks", "foolbox", "adversarial-robustness-toolbox", "robustbench-x"]
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    return [
        f"- Command: `{command}`, {date.today().isoformat()}",
        f"- Device: {device}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads; load at the start "
        f"{os.getloadavg()[0]:.1f}",
        f"- Versions: Python {platform.python_version()}, {versions}",
        f"- Seed {SEED}, linf, one batch, float32; seconds are the best of the rounds named in each title",
        "",
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def pgd_section(victims: Sequence[Victim], repeats: int, console: Console) -> list[str]:
    """PGD on every victim, with the targets."""
    page = ["## PGD", ""]
    for victim in victims:
        for steps in PGD_STEPS:
            rounds = max(1, round(repeats * PGD_STEPS[0] / steps))
            task = Task(victim=victim, threat=ThreatModel(eps=PGD_EPS), steps=steps)
            results = race(task, PGD_ROWS, rounds, console)
            title = f"{victim.title}: PGD, eps {PGD_EPS * 255:g}/255, {steps} steps, best of {rounds}"
            page += _render(title, _columns("hand-written"), _rows(results, results[0]), console)
            targets = _targets(steps, results)
            console.print("\n".join(targets), highlight=False)
            page += targets
    return page


def loop_section(count: int, repeats: int, device: torch.device, console: Console) -> list[str]:
    """What the loops themselves cost, behind a network that costs nothing."""
    task = Task(victim=free_victim(count, device), threat=ThreatModel(eps=PGD_EPS), steps=LOOP_STEPS)
    results = race(task, PGD_ROWS, repeats, console)
    title = f"{task.victim.title}: PGD, {LOOP_STEPS} steps, best of {repeats}"
    table = _render(title, _columns("hand-written"), _rows(results, results[0]), console)
    full = next(r for r in results if r.name == OURS_ALL)
    added = (full.cpu_seconds - results[0].cpu_seconds) / LOOP_STEPS * 1e3
    note = f"- The exhaustive mode adds {added:.1f} ms of processor time a step to the hand-written loop."
    console.print(note, highlight=False)
    return ["## The loop itself", "", *table, note, ""]


def apgd_section(victims: Sequence[Victim], console: Console) -> list[str]:
    """Native APGD on the cross-entropy beside torchattacks' APGD; one round, since robust accuracy is the point."""
    page = ["## APGD on the cross-entropy, one restart", ""]
    for victim in victims:
        for eps in APGD_EPS:
            task = Task(victim=victim, threat=ThreatModel(eps=eps), steps=APGD_STEPS)
            results = race(task, APGD_ROWS, 1, console)
            title = f"{victim.title}: APGD, eps {eps * 255:g}/255, {APGD_STEPS} steps, one round"
            reference = next(r for r in results if not r.missing)
            page += _render(title, _columns(reference.name), _rows(results, reference), console)
    return page


def main() -> None:
    """Runs every table and writes the page."""
    parser = argparse.ArgumentParser(description="PGD and APGD beside the peer libraries.")
    parser.add_argument("--images", type=int, default=20, help="images per victim (default 20)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds at 10 steps; fewer at 50, in proportion")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; 1 is the least noisy when shared")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/pgd.md"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # the peers' deprecations
    console, device = Console(width=170), torch.device(args.device)
    command = f"python benchmarks/pgd.py --images {args.images} --repeats {args.repeats}"
    command += f" --threads {args.threads}" if args.threads else ""
    command += f" --device {args.device}" if args.device != "cpu" else ""
    page = ["# PGD beside the peer libraries", "", *_setting(args, command)]
    page += loop_section(args.images, args.repeats, device, console)
    victims = load_victims(args.images, device)
    page += apgd_section(victims, console)
    page += pgd_section(victims, args.repeats, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
