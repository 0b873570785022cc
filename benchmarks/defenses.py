"""Every defence against the whole ladder of attackers: docs/results/defenses.md.

    python benchmarks/defenses.py --work DIR [--part NAME] [--only NAME] [--write]

A group of defences (`rivals`, `tvm`, `raw_isp`) is run as it is, then as NAME_more (the budgets that are left) and
NAME_costly (the members that ask most of a processor, at 4/255).

Every run is an audit into a folder under DIR, so a killed one goes on where it stopped; `--write` makes the page from
what is there. Everything comes from Python packages.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import defenses_page
import torch
from advencoder import Says

from robustbench_x.config import AuditConfig
from robustbench_x.encoders.source import load_encoder
from robustbench_x.engine import run_audit
from robustbench_x.engine.fit import FitRequest, fit_plugin
from robustbench_x.engine.run import resolve_device
from robustbench_x.engine.supply import find_defense
from robustbench_x.registry import load_registry
from robustbench_x.threat import ThreatModel

VICTIMS: dict[str, dict[str, Any]] = {
    "photos": {"encoder": "packaged:efficientnet_lite0", "head": "native", "data": "packaged:photos"},
    "digits": {"encoder": "packaged:efficientnet_lite0?size=96", "head": "linear", "data": "packaged:digits"},
    "dinov2": {"encoder": "packaged:dinov2_vits14?size=98", "head": "linear", "data": "packaged:digits"},
}
SAMPLES = {"photos": 20, "digits": 20, "dinov2": 8}
BUDGETS = {"photos": ("4/255",), "digits": ("2/255", "4/255", "8/255"), "dinov2": ("4/255",)}
"""All three where a processor is quick enough; the rest is a part of its own."""
RIVALS: tuple[dict[str, Any], ...] = (
    {"name": "jpeg"},
    {"name": "jpeg_random"},
    {"name": "bit_depth"},
    {"name": "gaussian_noise"},
    {"name": "median"},
    {"name": "resize_pad"},
    {"name": "super_resolution"},
    {"name": "crop_ensemble", "crops": 3},
    {"name": "mvg"},
    {"name": "feature_squeezing"},
)
COSTLY = ("jpeg_random", "super_resolution", "crop_ensemble", "resize_pad", "raw_isp, S alone", "raw_isp, G alone")
"""Run with the others on the cheapest victim alone."""
RAW: tuple[dict[str, Any], ...] = (
    {"name": "raw_isp"},
    {"name": "raw_isp", "label": "raw_isp, S alone", "omega": 0.0, "knowledge": ["oblivious", "full"]},
    {"name": "raw_isp", "label": "raw_isp, G alone", "omega": 1.0, "knowledge": ["oblivious", "full"]},
)
GROUPS = {"rivals": RIVALS, "tvm": ({"name": "tvm"},), "raw_isp": RAW}
EOT = 2
GRADIENTS: tuple[dict[str, Any], ...] = (
    {"name": "noise"},
    {"name": "transfer", "steps": 5},
    {"name": "pgd", "steps": 10, "eot": EOT},
    {"name": "apgd_ce", "steps": 10, "eot": EOT},
)
LAST: tuple[dict[str, Any], ...] = (
    {"name": "noise"},
    {"name": "uap", "steps": 30, "batch": 8},
    {"name": "square", "queries": 200},
    {"name": "random_search", "queries": 50},
)
"""The rungs that ask most of a processor: universal through the defence, and black box; at 4/255 alone."""
HARDENED: dict[str, tuple[str, dict[str, Any]]] = {
    "pruning 0.3": ("pruning", {"amount": 0.3}),
    "pruning 0.7": ("pruning", {"amount": 0.7}),
    "fare": ("fare", {}),
    "tecoa": ("tecoa", {}),
}
"""AdvEncoder's defences that change the encoder: of its user, and of its provider (adversarial training)."""
PARTS = (
    *GROUPS,
    "rivals_costly",
    "raw_isp_costly",
    "rivals_more",
    "raw_isp_more",
    "last_rungs",
    "hardened",
    "throughput",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--only", action="append", help="victims by name; all by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", action="store_true", help="write the page from what is there")
    parser.add_argument("--page", type=Path, default=Path("docs/results/defenses.md"))
    given = parser.parse_args()
    parts = given.part or ([] if given.write else list(PARTS))
    for part in parts:
        if part == "throughput":
            throughput(given.work / "throughput.json", given.device)
            continue
        if part == "hardened":
            for name, config in hardened(given.work, given.device):
                print(f"{part}: {name}", flush=True)
                run_audit(config, given.work / "hardened" / name, command=" ".join(sys.argv), progress=Says())
            continue
        for name, config in configs(part, given.device, given.only or list(VICTIMS)):
            print(f"{part}: {name}", flush=True)
            run_audit(config, given.work / "runs" / f"{part}-{name}", command=" ".join(sys.argv), progress=Says())
    if given.write or not given.part:
        defenses_page.write(given.page, given.work)


def configs(part: str, device: str, victims: list[str]) -> Iterator[tuple[str, AuditConfig]]:
    """The audits of one part, by name of the victim."""
    for name in victims:
        shared = {"target": [VICTIMS[name]], "samples": SAMPLES[name], "device": device, "seed": 0}
        if part == "last_rungs":
            for group, defenses in GROUPS.items():
                if group == "raw_isp":
                    defenses = defenses[:1]
                known = [
                    entry if _detects(entry) else {**entry, "knowledge": ["oblivious", "full"]}
                    for entry in defenses
                    if name == "digits" or entry["name"] not in COSTLY
                ]
                values = {**shared, "attack": list(LAST), "defense": known, "eps": ["4/255"]}
                yield f"{group}-{name}", AuditConfig.model_validate(values)
            continue
        entries, budgets = _asked(part, name)
        if not entries or not budgets:
            continue
        known = [
            entry if _detects(entry) else {"knowledge": ["oblivious", "bpda", "bpda_learned", "full"], **entry}
            for entry in entries
        ]
        yield (
            name,
            AuditConfig.model_validate({**shared, "attack": list(GRADIENTS), "defense": known, "eps": list(budgets)}),
        )


def _asked(part: str, victim: str) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """The defences and the budgets of one part on one victim; none where an earlier part has them."""
    quick = BUDGETS[victim] == BUDGETS["digits"]
    group = part.removesuffix("_more").removesuffix("_costly")
    entries = GROUPS[group]
    dear = tuple(entry for entry in entries if entry.get("label", entry["name"]) in COSTLY)
    cheap = tuple(entry for entry in entries if entry not in dear)
    if part == "tvm":
        return entries, ("4/255",)  # 32 solver steps a look, and 20 looks to judge
    if part.endswith("_costly"):
        return (() if quick else dear), ("4/255",)
    if part.endswith("_more"):
        return cheap, tuple(eps for eps in BUDGETS["digits"] if eps not in BUDGETS[victim])
    return (entries if quick else cheap), BUDGETS[victim]


def hardened(work: Path, device: str) -> Iterator[tuple[str, AuditConfig]]:
    """Audits of encoders that were pruned or trained adversarially, and of the original, at 4/255 on digits."""
    plain = VICTIMS["digits"]["encoder"]
    made = {"original": plain}
    for name, (plugin, params) in HARDENED.items():
        out = work / "hardened" / f"{name.replace(' ', '-')}.safetensors"
        eps = 0.0 if plugin == "pruning" else 4 / 255
        request = FitRequest(
            plugin=plugin, encoder=plain, threat=ThreatModel(eps=eps), out=out, params=params, device=device
        )
        fit_plugin(request, load_registry(), Says())
        made[name] = f"hardened:{out}"
    carried = {"name": "uap", "steps": 30, "batch": 8}
    for name, encoder in made.items():
        target = {**VICTIMS["digits"], "encoder": encoder}
        # What was learned of the public encoder before it was changed, and what is learned of it now.
        universal = [
            carried,
            *([] if name == "original" else [{**carried, "label": "uap, original", "fit_encoder": plain}]),
        ]
        values = {"target": [target], "samples": SAMPLES["digits"], "device": device, "eps": ["4/255"], "seed": 0}
        yield name, AuditConfig.model_validate({**values, "attack": [*GRADIENTS, *universal]})


def _detects(entry: dict[str, Any]) -> bool:
    return load_registry().defenses[entry["name"]].detects


@torch.no_grad()
def throughput(path: Path, asked: str) -> None:
    """Images a second of raw_isp and of the encoder behind it, in turns, one after the other."""
    device, registry = resolve_device(asked), load_registry()
    spec = registry.defenses["raw_isp"]
    built = spec.build()
    learned = {k: t.to(device) for k, t in find_defense(spec, built, None).artifact.tensors.items()}
    defense = built.armed(learned)
    rows = []
    for source, batch in (("packaged:efficientnet_lite0", 4), ("packaged:dinov2_vits14?size=98", 4)):
        encoder = load_encoder(source, registry).encoder.to(device)
        images = torch.rand(batch, 3, *encoder.input_size, device=device)
        best = {"raw_isp": float("inf"), "encoder": float("inf")}
        for _ in range(6):
            for name, run in (("raw_isp", defense.apply), ("encoder", encoder)):
                started = time.perf_counter()
                run(images)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best[name] = min(best[name], (time.perf_counter() - started) / batch)
        rows.append({"source": source, "size": list(encoder.input_size), **best})
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {"device": str(device), "threads": torch.get_num_threads(), "rows": rows}
    path.write_text(json.dumps(note, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
