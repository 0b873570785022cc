"""Writes the shipped Adv-PER artefacts with their cards: python benchmarks/ship_advencoder.py FILE [FILE ...]

Each FILE is what `rbx fit advencoder -e SOURCE --out FILE` wrote for a packaged encoder.
"""

import sys
from pathlib import Path

from robustbench_x.fitting import read_artifact, write_artifact
from robustbench_x.numbers import format_eps

WEIGHTS = Path(__file__).parents[1] / "attacks" / "robustbench_x_attacks" / "weights"


def main() -> None:
    for name in sys.argv[1:]:
        artifact = read_artifact(Path(name))
        made = artifact.provenance
        stem = "advencoder-" + made.encoder.partition(":")[2].partition("?")[0]
        write_artifact(WEIGHTS / f"{stem}.safetensors", artifact)
        height, width = made.input_size
        losses = ", ".join(f"{term} {value:.4f}" for term, value in made.losses.items())
        given = "".join(f" -p {name}={made.params[name]}" for name in ("contrast",) if made.params[name] is not None)
        command = (
            f"rbx fit advencoder -e '{made.encoder}' --surrogate {made.surrogate} --samples {made.surrogate_samples} "
            f"--eps {format_eps(made.threat.eps)} --seed {made.seed}{given} --out {stem}.safetensors"
        )
        packages = ", ".join(f"{name} {version}" for name, version in made.packages.items())
        cost = f"{made.seconds:.0f} s on {made.device}, {made.forwards} forward, {made.backwards} backward"
        card = f"""# {stem}

One perturbation against every image and every task downstream of `{made.encoder}`, for tests of
robustness: load it with `-p advencoder.artifact=shipped`.

| | |
|---|---|
| attack | {made.plugin}, setting {made.params["setting"]}{given}, {made.threat.norm} {format_eps(made.threat.eps)} |
| encoder | `{made.encoder}`, sha256 {made.encoder_sha256}, {height} x {width} pixels |
| training data | {made.surrogate_samples} images of `{made.surrogate}` (photographs of scikit-image, scikit-learn) |
| command | `{command}` |
| cost | {made.steps} steps, {cost} |
| loss at the last step | {losses} |
| made | {made.created}, robustbench-x {made.version}, {packages} |
| sha256 of the tensors | {artifact.sha256} |
| licence | MIT, as the package |

Trained without labels, heads or downstream images. `docs/results/advencoder.md` has figures of trainings with the same
settings; what this very file does is in the report of every audit that uses it.
"""
        (WEIGHTS / f"{stem}.md").write_text(card, encoding="utf-8")
        print(WEIGHTS / f"{stem}.safetensors")


if __name__ == "__main__":
    main()
