"""DTA and its baselines against tuned victims, its cost, and what hardens against it: docs/results/dta.md.

    python benchmarks/dta.py --work DIR [--part grid|low|variants|cost|hardening] [--write]

Every part is an audit into a folder under DIR, so a killed run goes on where it stopped; `--write` makes the page from
what is there. Fashion-MNIST comes from Debian's package dataset-fashion-mnist, everything else from Python packages.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import dta_cost
import dta_page
import fashion
from advencoder import Says

from robustbench_x.config import AuditConfig
from robustbench_x.engine import run_audit
from robustbench_x.engine.fit import FitRequest, fit_plugin
from robustbench_x.registry import load_registry
from robustbench_x.threat import ThreatModel

ENCODERS = ("packaged:efficientnet_lite0?size=96", "packaged:dinov2_vits14?size=98")
FRACTAL = "fractal:classes=50,train=10,test=4,size=96"
HEADS = ("linear", "mlp", "lora", "full")
BUDGETS = ("2/255", "4/255", "8/255", "10/255")
STEPS = {"steps": 10}
NAMES = ("digits", "fashion", "fractal")
BASELINES = ("embed", "nrdm", "dr_image", "ssp_image", "umi_grat", "instance:MIFGSM")
"""Encoder-only attacks, 10 steps each, like `dta`; `pgd` on the tuned victim is the ceiling."""
PARTS = ("grid", "low", "variants", "cost", "hardening")
HARDENED_EPS = 4 / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--only", action="append", help="runs of the parts by name; all by default")
    parser.add_argument(
        "--samples", type=int, default=64, help="images a cell on EfficientNet; 5 in 16 of that on DINOv2"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", action="store_true", help="write the page from what is there")
    parser.add_argument("--page", type=Path, default=Path("docs/results/dta.md"))
    given = parser.parse_args()
    parts = given.part or ([] if given.write else list(PARTS))
    data = (
        "packaged:digits",
        f"folder:{fashion.write_folder(given.work / 'fashion', train=300, test=1000)}",
        FRACTAL,
    )
    for part in parts:
        if part == "cost":
            dta_cost.measure(given.work / "cost.json", ENCODERS, device=given.device)
            continue
        for name, config in configs(part, data, given.work, given.samples, given.device):
            if given.only and name not in given.only:
                continue
            print(f"{part}: {name}", flush=True)
            run_audit(config, given.work / "runs" / f"{part}-{name}", command=" ".join(sys.argv), progress=Says())
    if given.write or not given.part:
        dta_page.write(given.page, given.work)


def configs(part: str, data: Sequence[str], work: Path, samples: int, device: str) -> Iterator[tuple[str, AuditConfig]]:
    """The audits of one part, by name; those of `hardening` train their encoder first."""

    def audit(encoder: str, attacks: list[dict[str, Any]], **settings: Any) -> AuditConfig:
        target = {"encoder": encoder, "head": list(settings.pop("head", HEADS)), "data": settings.pop("data")}
        count = samples if "dinov2" not in encoder else 5 * samples // 16
        values = {"eps": list(BUDGETS), "samples": count, "device": device, "seed": 0, **settings}
        return AuditConfig.model_validate({"target": [target], "attack": attacks, **values})

    short = {encoder: encoder.partition(":")[2].partition("_")[0] for encoder in ENCODERS}
    if part == "grid":
        for encoder in ENCODERS:
            # One run per data set, so that a page can be written while others are still at work.
            for source, name in zip(data, NAMES, strict=True):
                yield f"{short[encoder]}-{name}", audit(encoder, everything(), data=source)
    elif part == "low":
        # EfficientNet-Lite0 is at the ceiling from 2/255 on, so attacks differ below it only.
        for source, name in zip(data, NAMES, strict=True):
            yield f"{short[ENCODERS[0]]}-{name}", audit(ENCODERS[0], everything(), data=source, eps=["1/255"])
    elif part == "variants":
        for encoder in ENCODERS:
            budgets = ["2/255"] if encoder == ENCODERS[0] else ["10/255"]
            heads = ("linear", "full")
            yield short[encoder], audit(encoder, variants(encoder), data=data[0], eps=budgets, head=heads)
    else:
        plain = ENCODERS[0]
        hardened = {name: harden(work, plain, name, device) for name in ("fare", "dta_training")}
        for name, source in {"before": plain, **hardened}.items():
            yield name, audit(source, everything(), data=data[0], eps=["2/255", "4/255"], head=("linear", "mlp"))


def everything() -> list[dict[str, Any]]:
    """DTA, its baselines and the white-box ceiling, 10 steps each."""
    names = ("dta", *BASELINES, "pgd")
    return [{"name": name, **STEPS} for name in names]


def variants(encoder: str) -> list[dict[str, Any]]:
    """What was tried of the design, each against the default; on DINOv2 only what needs no search of its own."""
    if encoder == ENCODERS[0]:
        rows: dict[str, dict[str, Any]] = {
            "default": {},
            **{f"layer {name} alone": {"layers": name} for name in ("blocks.0", "blocks.2", "blocks.4", "blocks.6")},
            "top 1": {"top": 1},
            "top 2": {"top": 2},
            "sum over all layers": {"top": 99},
            "with pooled features": {"pooled": 1.0},
            "search per image": {"search": "image"},
            "momentum": {"rule": "mi"},
            "apgd": {"rule": "apgd"},
            "diversity 0.5": {"diversity": 0.5},
            "noise 0.5": {"noise": 0.5},
            "noise 0.5, 3 draws": {"noise": 0.5, "average": 3},
            "20 steps": {"steps": 20},
        }
    else:
        middle = "blocks.5,blocks.7,blocks.9"
        rows = {
            **{f"layer blocks.{number} alone": {"layers": f"blocks.{number}"} for number in (1, 3, 5, 7, 9, 11)},
            "layers 5, 7, 9": {"layers": middle},
            "layers 5, 7, 9, momentum": {"layers": middle, "rule": "mi"},
            "layers 5, 7, 9, 50 steps": {"layers": middle, "steps": 50},
            "layers 5, 7, 9, class token": {"layers": middle, "tokens": "class"},
            "all layers": {"layers": ",".join(f"blocks.{number}" for number in range(12))},
        }
    named = [{"name": "dta", "label": f"dta, {label}", **STEPS, **params} for label, params in rows.items()]
    return [*named, {"name": "embed", **STEPS}]


def harden(work: Path, encoder: str, plugin: str, device: str) -> str:
    """The source of `encoder` hardened by `plugin`, trained on the first call."""
    out = work / f"{plugin}.safetensors"
    if not out.exists():
        request = FitRequest(
            plugin=plugin,
            encoder=encoder,
            threat=ThreatModel(eps=HARDENED_EPS),
            out=out,
            params={},
            samples=512,
            device=device,
        )
        fit_plugin(request, load_registry(), Says())
    return f"hardened:{out}"


if __name__ == "__main__":
    main()
