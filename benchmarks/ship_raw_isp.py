"""Trains the weights that `raw_isp` ships, and writes their card: python benchmarks/ship_raw_isp.py

Photographs: those of scikit-image and scikit-learn, and those of the Debian packages mate-backgrounds and
plasma-workspace-wallpapers where they are installed (apt install them first). Drawings and renderings are left out.
"""

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from robustbench_x.engine.fit import FitRequest, fit_plugin
from robustbench_x.registry import load_registry
from robustbench_x.threat import ThreatModel

WEIGHTS = Path("defenses/robustbench_x_defenses/weights")
MATE = ["Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings"]
MATE += ["Wood", "YellowFlower"]
PLASMA = ["Autumn", "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey"]
PLASMA += ["Kite", "OneStandsOut", "Path", "summer_1am"]
SCIKIT = {
    ("skimage", "data"): (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "rocket.jpg",
    ),
    ("sklearn", "datasets/images"): ("china.jpg", "flower.jpg"),
}
SAMPLES = 6144


class Told:
    """Prints what a training says of itself."""

    def begin(self, total: int, done: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def task(self, text: str) -> None:
        print(text, flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


def photographs() -> list[Path]:
    """Every photograph that is here."""
    found = [Path(f"/usr/share/backgrounds/mate/nature/{name}.jpg") for name in MATE]
    found += [Path(f"/usr/share/wallpapers/{name}/contents/images/2560x1600.jpg") for name in PLASMA]
    for (module, folder), names in SCIKIT.items():
        spec = importlib.util.find_spec(module)
        root = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
        found += [root / folder / name for name in names]
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(found)} photographs are missing, the first {missing[0]}")
    return found


def main() -> None:
    """Trains and writes `raw_isp.safetensors`; the card is kept by hand beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS / "raw_isp.safetensors")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("-p", "--param", action="append", default=[], help="name=value of raw_isp")
    asked = parser.parse_args()
    out = asked.out.resolve()
    params = dict(entry.split("=", 1) for entry in asked.param)
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held) / "photographs" / "all"
        folder.mkdir(parents=True)
        for number, path in enumerate(photographs()):
            shutil.copy(path, folder / f"{number:02d}-{path.parent.parent.parent.name}-{path.name}")
        os.chdir(held)  # the artefact names its images, and where this machine kept them is nobody's business
        request = FitRequest(
            plugin="raw_isp",
            encoder=None,
            threat=ThreatModel(eps=0),
            out=out,
            params=params,
            surrogate="folder:photographs",
            samples=asked.samples,
        )
        made = fit_plugin(request, load_registry(), Told())
    print(made.artifact.sha256, made.artifact.provenance.model_dump_json(indent=2))


if __name__ == "__main__":
    main()
