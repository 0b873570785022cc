"""Writes the shipped decoder of AnyAttack with its card: python benchmarks/ship_anyattack.py FILE [FILE ...]

Each FILE is what `rbx fit anyattack -e SOURCE --out FILE` wrote for a packaged encoder.
"""

import sys
from pathlib import Path

from ship_advencoder import WEIGHTS

from robustbench_x.fitting import read_artifact, write_artifact
from robustbench_x.numbers import format_eps
from robustbench_x.registry import load_registry

_GIVEN = ("stage", "decoder", "k", "temperature_start", "temperature_end", "rate", "steps", "batch", "augment")


def main() -> None:
    defaults = {p.name: p.default for p in load_registry().attacks["anyattack"].params}
    for name in sys.argv[1:]:
        artifact = read_artifact(Path(name))
        made = artifact.provenance
        stem = "anyattack-" + made.encoder.partition(":")[2].partition("?")[0]
        write_artifact(WEIGHTS / f"{stem}.safetensors", artifact)
        size = (WEIGHTS / f"{stem}.safetensors").stat().st_size / 1e6
        height, width = made.input_size
        losses = ", ".join(f"{term} {value:.4f}" for term, value in made.losses.items())
        given = "".join(f" -p {key}={made.params[key]}" for key in _GIVEN if made.params[key] != defaults[key])
        command = (
            f"rbx fit anyattack -e '{made.encoder}' --surrogate {made.surrogate} --samples {made.surrogate_samples} "
            f"--eps {format_eps(made.threat.eps)} --seed {made.seed}{given} --out {stem}.safetensors"
        )
        packages = ", ".join(f"{key} {version}" for key, version in made.packages.items())
        cost = f"{made.seconds:.0f} s on {made.device}, {made.forwards} forward, {made.backwards} backward"
        card = f"""# {stem}

A decoder that turns the embedding of a target image into noise, for tests of robustness: load it with
`-p anyattack.artifact=shipped`.

| | |
|---|---|
| attack | {made.plugin}, decoder {made.params["decoder"]}, stage {made.params["stage"]}, mode {made.params["mode"]} |
| budget | {made.threat.norm} {format_eps(made.threat.eps)}; a smaller one clamps the noise |
| encoder | `{made.encoder}`, sha256 {made.encoder_sha256}, {height} x {width} pixels |
| training data | {made.surrogate_samples} images of `{made.surrogate}` (photographs of scikit-image, scikit-learn) |
| command | `{command}` |
| cost | {made.steps} steps, {cost} |
| loss at the last step | {losses} |
| made | {made.created}, robustbench-x {made.version}, {packages} |
| size | {size:.1f} MB |
| sha256 of the tensors | {artifact.sha256} |
| licence | MIT, as the package |

Trained without labels, heads or downstream images. What it is worth is in `docs/results/anyattack.md`.
"""
        (WEIGHTS / f"{stem}.md").write_text(card, encoding="utf-8")
        print(WEIGHTS / f"{stem}.safetensors")


if __name__ == "__main__":
    main()
