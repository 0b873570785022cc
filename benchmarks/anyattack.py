"""AnyAttack beside the iterative attacks that aim: docs/results/anyattack.md.

    python benchmarks/anyattack.py --work DIR [--only NAME] [--artifact FILE] [--write]

Every run is an audit into a folder under DIR, so a killed one goes on where it stopped; `--write` makes the page from
what is there. Everything comes from Python packages.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import anyattack_page
from advencoder import Says

from robustbench_x.config import AuditConfig
from robustbench_x.engine import run_audit

SURROGATE = "packaged:efficientnet_lite0?size=96"
VICTIMS: dict[str, tuple[dict[str, Any], int]] = {
    "digits": ({"encoder": SURROGATE, "head": ["linear", "retrieval"], "data": "packaged:digits"}, 40),
    "photos": ({"encoder": "packaged:efficientnet_lite0", "head": "native", "data": "packaged:photos"}, 20),
    "conse": ({"encoder": "packaged:conse_minilm", "head": ["captions", "zero_shot"], "data": "packaged:photos"}, 20),
    "dinov2": ({"encoder": "packaged:dinov2_vits14?size=98", "head": "linear", "data": "packaged:digits"}, 20),
}
"""The decoder's own surrogate, the same network at another size, an image-text encoder over it, and another network."""
STEPS = (10, 100, 300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", action="append", help="victims by name; all by default")
    parser.add_argument("--artifact", default="shipped", help="the decoder; the shipped one by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", action="store_true", help="write the page from what is there, and run nothing")
    parser.add_argument("--page", type=Path, default=Path("docs/results/anyattack.md"))
    given = parser.parse_args()
    for name in [] if given.write else given.only or VICTIMS:
        print(name, flush=True)
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
        *({"name": "attackvlm_ii", "label": f"attackvlm_ii, {n} steps", "steps": n} for n in STEPS),
        {"name": "m_attack", "steps": 50},
        {"name": "ssa_cwa", "steps": 10, "samples": 5},
    ]
    if name == "conse":
        attacks.append({"name": "attackvlm_it", "steps": 100})
    if name in ("conse", "dinov2"):
        attacks.append(
            {"name": "m_attack", "label": "m_attack, transfer", "steps": 50, "own": False, "encoders": SURROGATE}
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


if __name__ == "__main__":
    main()
