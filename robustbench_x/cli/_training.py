"""What `rbx fit` and `rbx craft` do once their flags are read."""

from rich.console import Console
from rich.text import Text

from robustbench_x.cli._progress import progress_on
from robustbench_x.engine.craft_folder import CraftRequest, craft_folder
from robustbench_x.engine.fit import FitRequest, fit_plugin
from robustbench_x.errors import ConfigError
from robustbench_x.numbers import format_eps, parse_number
from robustbench_x.registry import load_registry
from robustbench_x.report.inert import plain
from robustbench_x.report.words import count
from robustbench_x.result import Provenance
from robustbench_x.threat import ThreatModel
from robustbench_x.world import leads

__all__ = ["fit_threat", "run_craft", "run_fit", "threat_from"]

_BUDGETS = {"linf": "10/255", "patch": "0.03"}
_INCOMPLETE = 3


def threat_from(norm: str, eps: str | None, placement: str) -> ThreatModel:
    """The budget of the flags; the paper's where none is given.

    Raises:
        ConfigError: A value is wrong, or the norm has no default budget.
    """
    if eps is None and norm not in _BUDGETS:
        raise ConfigError(f"norm {norm} has no default budget; give --eps")
    value = parse_number(eps if eps is not None else _BUDGETS[norm])
    return ThreatModel(norm=norm, eps=value, placement=placement)  # type: ignore[arg-type]  # checked there


def fit_threat(plugin: str, norm: str, eps: str | None, placement: str) -> ThreatModel:
    """`threat_from`, with the linf budget of the hardening where `plugin` is one, or none where it needs none."""
    hardenings = load_registry().hardenings
    if eps is None and plugin in hardenings:
        if not hardenings[plugin].attacked:
            return ThreatModel(eps=0)
        if norm == "linf":
            eps = hardenings[plugin].eps
    return threat_from(norm, eps, placement)


def run_fit(request: FitRequest) -> None:
    """Trains with a progress bar and says what came of it; of `torchrun`'s processes the first alone speaks."""
    if not leads():
        fit_plugin(request, load_registry())
        return
    with progress_on(Console(stderr=True), opening=f"{request.plugin} into {request.out}") as progress:
        found = fit_plugin(request, load_registry(), progress)
    made = found.artifact.provenance
    losses = ", ".join(f"{name} {value:.4g}" for name, value in made.losses.items())
    images = (
        f"{made.steps} steps on {count(made.surrogate_samples, 'image')} of {made.surrogate}"
        if made.surrogate_samples
        else "no image"
    )
    lines = (
        f"{request.out}  sha256 {found.artifact.sha256}",
        f"{_subject(made)}: {images} in {made.seconds:.0f} s ({found.origin}); {losses}",
        *([] if made.inner is None else [f"audit it: rbx audit -e hardened:{request.out}"]),
    )
    for line in lines:
        Console().print(Text(plain(line, 500)), soft_wrap=True)


def _subject(made: Provenance) -> str:
    """What was trained for what, in words; a defence knows no budget."""
    if made.threat.eps:
        return f"{made.plugin} on {made.encoder}, {made.threat.norm} {format_eps(made.threat.eps)}"
    return made.plugin if made.encoder == "none" else f"{made.plugin} on {made.encoder}"


def run_craft(request: CraftRequest) -> int:
    """Writes the images; returns 3 when one of them could not be made, whatever became of the others."""
    with progress_on(Console(stderr=True), opening=f"{request.attack} into {request.out}") as progress:
        manifest = craft_folder(request, load_registry(), progress)
    failed = [entry for entry in manifest["images"] if "error" in entry]
    made = count(len(manifest["images"]) - len(failed), "image")
    Console().print(Text(f"{made} in {request.out}, {len(failed)} failed; manifest.json says what was done"))
    for entry in failed[:3]:
        Console(stderr=True).print(Text(plain(f"{entry['source']}: {entry['error']}", 500)), soft_wrap=True)
    return _INCOMPLETE if failed else 0
