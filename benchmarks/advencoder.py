"""AdvEncoder beside the universal baselines: docs/results/advencoder.md.

    python benchmarks/advencoder.py --work DIR [--part grid|patch|transfer|ablation|throughput] [--write]

Every part is an audit into a folder under DIR, so a killed run goes on where it stopped; `--write` makes the page from
what is there. Fashion-MNIST comes from Debian's package dataset-fashion-mnist, everything else from Python packages.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import advencoder_page
import advencoder_throughput
import fashion

from robustbench_x.config import AuditConfig
from robustbench_x.engine import run_audit
from robustbench_x.engine.artifacts import artifact_path
from robustbench_x.result import read_report

ENCODERS = ("packaged:efficientnet_lite0?size=96", "packaged:dinov2_vits14?size=98")
FRACTAL = "fractal:classes=50,train=20,test=4,size=96"
CROPS = "packaged:crops"
SURROGATE_FRACTAL = "fractal:classes=200,train=5,test=1,size=96,seed=7"
HEADS = ("linear", "mlp", "knn", "retrieval")
GENERATOR = {"noises": 16, "batch": 16, "steps": 200}
"""A reduced schedule of `paper` and `code`, which have 256 noises and 20 epochs of batches of 256."""
SMALL = {"noises": 16, "width": 256, "batch": 16, "steps": 200}
"""The same with a generator a quarter as wide, for the patches."""
SHORT = {**SMALL, "steps": 100}
"""And with half the steps, for the ablation."""
TOKENS = {"name": "advencoder", "label": "advencoder tokens", "contrast": "tokens"}
"""One of the two trainings of the setting `best`, at the cost of every other attack."""
PARTS = ("best", "grid", "patch", "transfer", "ablation", "throughput")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--only", action="append", help="runs of the parts by name; all by default")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", action="store_true", help="write the page from what is there")
    parser.add_argument("--page", type=Path, default=Path("docs/results/advencoder.md"))
    given = parser.parse_args()
    parts = given.part or ([] if given.write else list(PARTS))
    data = (f"folder:{fashion.write_folder(given.work / 'fashion')}", "packaged:digits", FRACTAL)
    for part in parts:
        if part == "throughput":
            advencoder_throughput.measure(given.work / "throughput.json", device=given.device)
            continue
        for name, config in configs(part, data, given.work, given.samples, given.device).items():
            if given.only and name not in given.only:
                continue
            print(f"{part}: {name}", flush=True)
            run_audit(config, given.work / "runs" / f"{part}-{name}", command=" ".join(sys.argv), progress=Says())
    if given.write or not given.part:
        advencoder_page.write(given.page, given.work)


def configs(part: str, data: Sequence[str], work: Path, samples: int, device: str) -> dict[str, AuditConfig]:
    """The audits of one part, by name."""

    def audit(encoder: str, attacks: list[dict[str, Any]], **settings: Any) -> AuditConfig:
        target = {"encoder": encoder, "head": list(HEADS), "data": list(settings.pop("data", data))}
        values = {"eps": "10/255", "surrogate": CROPS, "samples": samples, "device": device, "seed": 0, **settings}
        return AuditConfig.model_validate({"target": [target], "attack": attacks, **values})

    short = {encoder: encoder.partition(":")[2].partition("_")[0] for encoder in ENCODERS}
    other = dict(zip(ENCODERS, reversed(ENCODERS), strict=True))
    if part in ("best", "grid"):
        runs = {}
        for encoder in ENCODERS:
            best = [{"name": "advencoder"}]
            attacks = best if part == "best" else universal(other[encoder])
            runs[f"{short[encoder]}-crops"] = audit(encoder, attacks)
            some = best if part == "best" else [TOKENS, {"name": "uap"}]
            runs[f"{short[encoder]}-fractal"] = audit(encoder, some, surrogate=SURROGATE_FRACTAL)
        return runs
    if part == "patch":
        patches: list[dict[str, Any]] = [
            {"name": "advencoder"},
            {"name": "advencoder", "label": "advencoder code", "setting": "code", **SMALL},
        ]
        # The generator on EfficientNet only: on a CPU it costs more than everything else here.
        tried = {ENCODERS[0]: patches, ENCODERS[1]: patches[:1]}
        fixed = {short[e]: audit(e, tried[e], norm="patch", eps=0.03) for e in ENCODERS}
        anywhere = audit(ENCODERS[0], [{"name": "advencoder"}], norm="patch", eps=0.03, placement="random")
        return {**fixed, f"{short[ENCODERS[0]]}-random": anywhere}
    if part == "transfer":
        fits = {e: fitted(work / "runs" / f"best-{short[e]}-crops") for e in ENCODERS}
        return {
            short[e]: audit(e, [{"name": "advencoder", "fit_encoder": other[e], "artifact": fits[other[e]]}])
            for e in ENCODERS
        }
    tokens = [{**TOKENS, "label": "advencoder", "steps": 100}]
    sizes = {
        f"size-{count}": audit(ENCODERS[0], tokens, surrogate_samples=count, data=data[1:2])
        for count in (100, 1000, 10_000)
    }
    return {"terms": audit(ENCODERS[0], ablation(), data=data[1:2]), **sizes}


def fitted(run: Path) -> str:
    """The artefact of the setting `best` that a run of the grid kept."""
    cell = next(cell for cell in read_report(run).cells if cell.attack == "advencoder")
    assert cell.fit is not None, "a fitted attack has an artefact"
    return str(artifact_path(run, cell.fit))


def universal(partner: str) -> list[dict[str, Any]]:
    """Every universal attack on one grid."""
    settings = [
        {"name": "advencoder", "label": f"advencoder {setting}", "setting": setting, **GENERATOR}
        for setting in ("paper", "code")
    ]
    pap = [{"name": "pap", "label": f"pap {variant}", "variant": variant} for variant in ("base", "fuse", "ugs")]
    plain = [{"name": name} for name in ("uap", "ssp", "dr", "fff")]
    return [TOKENS, *settings, *plain, *pap, {"name": "xtransfer", "partners": [partner]}]


def ablation() -> list[dict[str, Any]]:
    """Each term off, each form of the adversarial term, generator or not; half the steps of the grid."""
    direct = {"generator": False, "batch": 16, "steps": 100}
    rows: dict[str, dict[str, Any]] = {
        "best": {},
        "direct, tokens": {"contrast": "tokens"},
        "direct, shallow": {"contrast": "shallow"},
        "direct, cosine": {"contrast": "cosine"},
        "code": {"setting": "code", **SHORT},
        "code, no adv": {"setting": "code", "alpha": 0.0, **SHORT},
        "code, no hfc": {"setting": "code", "beta": 0.0, **SHORT},
        "code, no quality": {"setting": "code", "lam": 0.0, **SHORT},
        "code, direct": {"setting": "code", **direct},
        "paper": {"setting": "paper", **SHORT},
    }
    return [{"name": "advencoder", "label": label, "steps": 100, **params} for label, params in rows.items()]


class Says:
    """Progress as lines: what is begun, and what is worth keeping."""

    def __init__(self) -> None:
        self._last = ""

    def begin(self, total: int, done: int) -> None:
        """See `Progress`."""

    def task(self, text: str) -> None:
        """See `Progress`."""
        started = text.partition(": step")[0].partition(": ")[0]
        if started != self._last:
            self._last = started
            print(f"  {started}", flush=True)

    def advance(self, units: int) -> None:
        """See `Progress`."""

    def say(self, text: str) -> None:
        """See `Progress`."""
        print(f"  {text}", flush=True)


if __name__ == "__main__":
    main()
