"""Native AutoAttack beside torchattacks': robust accuracy and passes per image: docs/results/autoattack.md.

    python benchmarks/autoattack.py [--samples N] [--steps S] [--queries Q] [--small-samples N] [--small-steps S]
        [--small-queries Q] [--small-eps E] [--threads T] [--device cpu|cuda] [--out FILE.md]

Both attack the same frozen network in float32 on the same images, all classified correctly, in one batch, with the
same steps, the nine likeliest wrong classes and the same queries. At 4/255 nothing resists, so the standard setting
is affordable; at the small budget a sample that resists costs everything there is, so steps and queries are fewer,
for both sides alike. torchattacks' own AutoAttack runs 10 steps toward every wrong class; it has a row where
nothing resists its first part. Its parts' steps and queries are set on its object, as the bridge does. Candidates are
judged alike, by a fresh forward pass after the same projection. The defaults take some 12 minutes on one core.
"""

import argparse
import contextlib
import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from pgd import _render, _setting, load_victims, race
from pgd_contenders import SEED, Contender, Plain, Result, Run, Task, Victim, ours

from robustbench_x.plugin import Attack
from robustbench_x.threat import ThreatModel
from robustbench_x.views import WhiteboxView
from robustbench_x_attacks.autoattack.suite import AutoAttack

EPS = 4 / 255
TARGETS = 9
OURS = "robustbench-x autoattack"
THEIRS = "torchattacks.AutoAttack, same setting"
SHIPPED = "torchattacks.AutoAttack as shipped"
COLUMNS = (
    "implementation",
    "robust accuracy",
    "gradients per image",
    "x ours",
    "forwards per image",
    "x ours (forwards)",
    "seconds, x ours",
    "CPU seconds, x ours",
)
GRADIENTS_AT_MOST = 0.2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of tables: the budget, and what both sides may spend on a sample that resists."""

    eps: float
    samples: int
    steps: int
    queries: int
    undefended: bool
    """Whether the target of one fifth of the gradients is meant for it: nearly everything falls at once."""


def contenders(setting: Setting) -> list[Contender]:
    """Who runs; the reference as shipped only where it does not have to try 999 targets."""

    def native(task: Task) -> Attack[WhiteboxView]:
        return AutoAttack(steps=task.steps, targets=TARGETS, queries=setting.queries)

    def same(task: Task) -> Run:
        return _torchattacks(task, min(task.victim.head.num_classes, TARGETS + 1), task.steps, setting.queries)

    def shipped(task: Task) -> Run:
        return _torchattacks(task, task.victim.head.num_classes, None, None)

    rows = [
        Contender(name=OURS, prepare=ours(native, exhaustive=False)),
        Contender(name=THEIRS, prepare=same, module="torchattacks", extra="torchattacks"),
    ]
    if setting.undefended:
        rows.append(Contender(name=SHIPPED, prepare=shipped, module="torchattacks", extra="torchattacks"))
    return rows


def _torchattacks(task: Task, classes: int, steps: int | None, queries: int | None) -> Run:
    """torchattacks.AutoAttack, standard; None leaves a number as it ships."""
    import torchattacks

    victim = task.victim
    model = Plain(victim.encoder, victim.head).eval().requires_grad_(False)
    attack: Any = torchattacks.AutoAttack(
        model, norm="Linf", eps=task.threat.eps, version="standard", n_classes=classes, seed=SEED
    )
    for part in attack._autoattack.attacks:
        if hasattr(part, "n_queries"):
            part.n_queries = queries or part.n_queries
        else:
            part.steps = steps or part.steps

    def craft() -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):
            images: Tensor = attack(victim.images, victim.labels)
        return images.detach()

    return Run(craft, model.meter)


@torch.no_grad()
def only_right(victim: Victim, count: int) -> Victim:
    """The first `count` images that it classifies correctly."""
    right = (victim.logits(victim.images).argmax(dim=1) == victim.labels).nonzero().flatten()[:count]
    title = (
        f"{victim.title.rpartition(', ')[0]}, {len(right)} correctly classified of {victim.title.rpartition(' ')[2]}"
    )
    return replace(victim, title=title, images=victim.images[right], labels=victim.labels[right])


def section(victims: Sequence[Victim], setting: Setting, console: Console) -> list[str]:
    """Every victim at one setting, with the targets."""
    page = [
        f"## eps {setting.eps * 255:g}/255: {setting.steps} steps a walk, {TARGETS} targets, {setting.queries} queries",
        "",
    ]
    for victim in victims:
        chosen = only_right(victim, setting.samples)
        task = Task(victim=chosen, threat=ThreatModel(eps=setting.eps), steps=setting.steps)
        results = race(task, contenders(setting), 1, console)
        page += _render(chosen.title, COLUMNS, _rows(results), console)
        verdict = _targets(results, undefended=setting.undefended)
        console.print("\n".join(verdict), highlight=False)
        page += verdict
    return page


def _rows(results: Sequence[Result]) -> list[list[str]]:
    rows, own = [], results[0]
    for r in results:
        if r.missing:
            rows.append([r.name, r.missing, *[""] * (len(COLUMNS) - 2)])
            continue
        rows.append(
            [
                r.name,
                f"{r.robust_accuracy:.3f}",
                f"{r.backwards:.2f}",
                f"{r.backwards / own.backwards:.2f}" if own.backwards else "",
                f"{r.forwards:.2f}",
                f"{r.forwards / own.forwards:.2f}",
                f"{r.seconds / own.seconds:.2f}",
                f"{r.cpu_seconds / own.cpu_seconds:.2f}",
            ]
        )
    return rows


def _targets(results: Sequence[Result], *, undefended: bool) -> list[str]:
    own, others = results[0], [r for r in results[1:] if not r.missing]
    lines = []
    for r in others:
        share = own.backwards / r.backwards
        lines.append(
            f"- Against {r.name}: robust accuracy {own.robust_accuracy:.3f} to {r.robust_accuracy:.3f}, target at most "
            f"as much: {_held(own.robust_accuracy <= r.robust_accuracy)}; {share:.3f} of its gradients"
            + (f", target at most {GRADIENTS_AT_MOST:g}: {_held(share <= GRADIENTS_AT_MOST)}." if undefended else ".")
        )
    return [*lines, ""]


def _held(good: bool) -> str:
    return "held" if good else "MISSED"


def main() -> None:
    """Runs every table and writes the page."""
    parser = argparse.ArgumentParser(description="AutoAttack beside torchattacks.")
    parser.add_argument("--samples", type=int, default=8, help="images per victim at 4/255")
    parser.add_argument("--steps", type=int, default=100, help="steps of each walk at 4/255")
    parser.add_argument("--queries", type=int, default=5000, help="queries of Square at 4/255")
    parser.add_argument("--small-samples", type=int, default=6, help="images per victim at the small budget")
    parser.add_argument("--small-steps", type=int, default=20, help="steps of each walk at the small budget")
    parser.add_argument("--small-queries", type=int, default=500, help="queries of Square at the small budget")
    parser.add_argument("--small-eps", type=float, default=0.25, help="the small budget, in 255ths")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; 1 is the least noisy when shared")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/autoattack.md"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # torchattacks' deprecations
    console, device = Console(width=170), torch.device(args.device)
    numbers = ("samples", "steps", "queries", "small_samples", "small_steps", "small_queries", "small_eps")
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(args, name):g}" for name in numbers)
    command = f"python benchmarks/autoattack.py {flags}" + (f" --threads {args.threads}" if args.threads else "")
    command += f" --device {args.device}" if args.device != "cpu" else ""
    page = ["# AutoAttack beside torchattacks", "", *_setting(args, command)]
    page += [
        "Gradients and forwards are counted at the network, in images. Both sides run the same steps, targets and "
        "queries, except torchattacks as shipped: 10 steps toward every wrong class. Where samples resist, steps and "
        "queries are those of the heading, below the standard 100 and 5,000.",
        "",
    ]
    victims = load_victims(2 * max(args.samples, args.small_samples), device)
    for setting in (
        Setting(eps=EPS, samples=args.samples, steps=args.steps, queries=args.queries, undefended=True),
        Setting(
            eps=args.small_eps / 255,
            samples=args.small_samples,
            steps=args.small_steps,
            queries=args.small_queries,
            undefended=False,
        ),
    ):
        page += section(victims, setting, console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
