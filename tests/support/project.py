"""A whole audit in a second: a folder of small images, tiny encoders, registries with planted plugins."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustbench_x_attacks
import robustbench_x_defenses
from robustbench_x.builtin import register_builtins
from robustbench_x.config import AuditConfig
from robustbench_x.engine import run_audit
from robustbench_x.gate import decide, judge_gates
from robustbench_x.plugin import AttackSpec, DefenseSpec
from robustbench_x.policy import Policy
from robustbench_x.registry import Registry
from robustbench_x.result import CellResult, Decision, Level, Report
from robustbench_x.views import Access, Knowledge

CLASSES = ("ant", "bee", "cat", "dog")
SIDE = 32
TINY, NATIVE = "python:project:tiny", "python:project:classifier"
Row = dict[str, Any]


def patterns() -> Tensor:
    """What tells the classes apart, `(4, 3, 32, 32)`, of mean 0 and size 1."""
    coarse = torch.randn(len(CLASSES), 3, 8, 8, generator=torch.Generator().manual_seed(7))
    fine = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=False)
    centred = fine - fine.mean(dim=(1, 2, 3), keepdim=True)
    scaled: Tensor = centred / centred.std(dim=(1, 2, 3), keepdim=True)
    return scaled


def write_images(root: Path, *, train: int = 16, test: int = 10, seed: int = 0) -> Path:
    """PNGs below `root/train` and `root/test`, one folder per class."""
    generator = torch.Generator().manual_seed(seed)
    for split, count in (("train", train), ("test", test)):
        for name, pattern in zip(CLASSES, patterns(), strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randn(pattern.shape, generator=generator)
                save_image(folder / f"{i:02d}.png", 0.5 + 0.06 * pattern + 0.05 * noise)
    return root


def save_image(path: Path, pixels: Tensor) -> None:
    """Writes `(3, H, W)` pixels as a PNG."""
    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    PIL.Image.frombytes("RGB", (levels.shape[1], levels.shape[0]), levels.numpy().tobytes()).save(path)


class TinyNet(nn.Module):
    """Two random convolutions with batch norm; 24 features."""

    input_size = SIDE
    layers = ("early", "late")

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.early = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.BatchNorm2d(12), nn.GELU())
            self.late = nn.Sequential(nn.Conv2d(12, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.GELU())

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.late(self.early(4 * (images - 0.5)))
        return features.flatten(1)


class Templates(nn.Module):
    """A linear classifier on pixels that compares with the class patterns."""

    input_size = SIDE
    classes = CLASSES

    def __init__(self, scale: float = 60.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(patterns().flatten(1) / (3 * SIDE * SIDE))
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * F.linear((images - 0.5).flatten(1), self.weight)


def tiny() -> nn.Module:
    """A random encoder whose linear head is right on nearly everything."""
    return TinyNet()


def other() -> nn.Module:
    """The same with other weights."""
    return TinyNet(seed=1)


def classifier() -> nn.Module:
    """A classifier, for the native head."""
    return Templates()


def probabilities() -> nn.Module:
    """The same, softmaxed."""

    class Softmaxed(Templates):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).softmax(dim=1)

    return Softmaxed()


def saturated() -> nn.Module:
    """The same with logits so large that the cross-entropy has no gradient left (defensive distillation)."""
    return Templates(scale=1e7)


def batch_normalised() -> nn.Module:
    """The same, but centred by the batch's own mean."""

    class Centred(Templates):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits - (logits.mean(dim=0, keepdim=True) if len(images) > 1 else 0)

    return Centred()


def registry(*specs: AttackSpec | DefenseSpec) -> Registry:
    """Everything first-party, and `specs`."""
    made = Registry()
    register_builtins(made)
    made.load(robustbench_x_attacks.register, origin="robustbench-x")
    made.load(robustbench_x_defenses.register, origin="robustbench-x")
    for spec in specs:
        if isinstance(spec, AttackSpec):
            made.add_attack(spec)
        else:
            made.add_defense(spec)
    return made


def attack(factory: type, *, access: Access = "whitebox", **spec: Any) -> AttackSpec:
    """A planted attack called after its class."""
    return AttackSpec(
        name=factory.__name__.lower(), summary="planted", factory=factory, source="planted", access=access, **spec
    )


def defense(factory: type, **spec: Any) -> DefenseSpec:
    """A planted defence called after its class."""
    return DefenseSpec(name=factory.__name__.lower(), summary="planted", factory=factory, source="planted", **spec)


PGD: Mapping[str, Any] = {"name": "pgd", "steps": 5}


def audit_config(
    images: Path,
    *,
    encoder: str | Sequence[str] = TINY,
    head: str | Sequence[str] = "linear",
    attacks: Sequence[str | Mapping[str, Any]] = (PGD,),
    defenses: Sequence[str | Mapping[str, Any]] = (),
    knowledge: Sequence[Knowledge] | None = None,
    **settings: Any,
) -> AuditConfig:
    """An audit of `images`, on the CPU, at 4/255 unless told otherwise."""
    shields = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in defenses]
    if knowledge:
        shields = [{**shield, "knowledge": list(knowledge)} for shield in shields]
    return AuditConfig.model_validate(
        {
            "target": [{"encoder": encoder, "head": head, "data": f"folder:{images}"}],
            "attack": [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in attacks],
            "defense": shields,
            "eps": "4/255",
            "batch_size": 16,
            "device": "cpu",
            "judge_draws": 5,
            **settings,
        }
    )


@dataclass(frozen=True, kw_only=True)
class Audited:
    """A report with its rows."""

    report: Report
    rows: list[Row]

    def cell(self, attack: str, *, defense: str = "none", knowledge: str | None = None, **where: str) -> CellResult:
        """The only cell that fits."""
        found = [
            cell
            for cell in self.report.cells
            if (cell.attack, cell.defense) == (attack, defense)
            and knowledge in (None, cell.knowledge)
            and all(getattr(cell, name) == value for name, value in where.items())
        ]
        assert len(found) == 1, f"{len(found)} cells fit {attack}, {defense}, {knowledge}, {where}"
        return found[0]

    def of(self, cell: CellResult) -> list[Row]:
        """The rows of a cell, by position."""
        return [row for row in self.rows if row["cell"] == cell.id]

    def ids(self, *levels: Level) -> set[str]:
        """The kinds of findings at `levels`; at any level when none is named."""
        return {f.id for f in self.report.findings if not levels or f.level in levels}

    def decide(self, *, strict: bool = False) -> Decision:
        """What the run comes to without a policy."""
        return decide(self.report, None, fail_on=(), strict=strict)

    def lenient_gate(self) -> Decision:
        """What a policy that asks for nothing, but keeps the default reliability, makes of the run."""
        gates = [{"metric": "robust_accuracy", "min": 0.0, "attack": "worst_case"}]
        policy = Policy.model_validate({"inconclusive": "pass", "gate": gates})
        verdicts = judge_gates(self.report, policy)
        return decide(self.report, verdicts, fail_on=policy.reliability.fail_on)


def audit(
    config: AuditConfig, out: Path, *specs: AttackSpec | DefenseSpec, resume: bool = True, **passed: Any
) -> Audited:
    """Runs an audit with `specs` planted, and reads its rows."""
    report = run_audit(config, out, registry=registry(*specs), resume=resume, **passed)
    return Audited(report=report, rows=pq.read_table(out / "samples.parquet").to_pylist())


def value(cell: CellResult, metric: str) -> float:
    """A measured metric."""
    measured = cell.metrics[metric].value
    assert measured is not None, f"{cell.id}: {metric} was not measured"
    return measured


def rows_without_time(rows: Sequence[Row]) -> list[Row]:
    """Rows as another run of the same audit must repeat them."""
    return [{name: entry for name, entry in row.items() if name != "seconds"} for row in rows]


def metrics_without_time(report: Report) -> dict[str, dict[str, Any]]:
    """Metrics of every cell and worst case as another run must repeat them."""
    cells = {
        cell.id: {name: m.model_dump() for name, m in cell.metrics.items() if name != "seconds"}
        for cell in report.cells
    }
    worst = {f"worst {i}": w.model_dump() for i, w in enumerate(report.worst_case)}
    return cells | worst


def corrupt_jpeg() -> bytes:
    """The first half of a JPEG."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (SIDE, SIDE), (200, 30, 90)).save(buffer, format="JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def main(config: str, out: str) -> None:
    """What a subprocess runs, to be killed."""
    run_audit(AuditConfig.model_validate_json(config), Path(out), registry=registry())
