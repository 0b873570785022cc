"""Checks of every victim of a stage before it is attacked, with each attacker's view of it, on a few images."""

from collections.abc import Callable, Sequence

import torch

from robustbench_x.diagnose import probe_defense, probe_detector, probe_gradient, probe_victim
from robustbench_x.engine.handout import attacker_sees
from robustbench_x.engine.isolation import isolated
from robustbench_x.engine.stage import StageAtWork
from robustbench_x.findings import finding
from robustbench_x.plan import UNDEFENDED, Craft
from robustbench_x.randomness import SampleRandom, derive_seed
from robustbench_x.registry import Registry
from robustbench_x.result import Finding
from robustbench_x.victim import perceive

__all__ = ["probe_stage"]

_IMAGES = 8


def probe_stage(stage: StageAtWork, registry: Registry) -> list[Finding]:
    """Findings of the forward checks of every (defence, head) and the gradient checks of every attacker's view."""
    batch = stage.batch(0)
    images = batch.images[:_IMAGES]
    if not len(images):
        return []
    # Perturbed images too, off the 8-bit grid: a defence may behave on clean ones only.
    threat = next((c.threat for c in stage.stage.crafts if c.threat.radius > 0), None)
    random = SampleRandom(range(len(images)), device=images.device)
    both = images if threat is None else torch.cat([images, threat.start(images, random)])
    source, data, crafts = stage.stage.encoder, stage.stage.data, stage.stage.crafts
    found: list[Finding] = []

    def guarded(where: str, cells: Sequence[str], probe: Callable[[], list[Finding]]) -> list[Finding]:
        """A probe's findings about `where`, for `cells`; a probe that fails is itself a finding, never silence."""
        try:
            with isolated(derive_seed(stage.seed, "probe", where), stage.device):
                results = probe()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it becomes an error-level finding
            results = [finding("probe_failed", f"{type(error).__name__}: {error}")]
        return [f.model_copy(update={"cell": where, "applies_to": tuple(cells)}) for f in results]

    def forward(shield: str, head: str) -> list[Finding]:
        return probe_victim(both, stage.defended(shield, head), stage.heads[head])

    def backward(craft: Craft) -> list[Finding]:
        loss = "cosine" if craft.head is None else "margin"
        shield = stage.shields[craft.seen]
        exact = shield is None or (craft.knowledge == "full" and shield.spec.gradient == "exact")
        honest = exact and not (shield is not None and shield.spec.stochastic)
        see = attacker_sees(stage, craft, craft.head)
        return probe_gradient(images, see, craft.threat, loss=loss, honest=honest)

    def swallowed(title: str) -> list[Finding]:
        shield = stage.shields[title]
        if shield is None or shield.spec.detects or "full" not in shield.spec.knowledge:
            return []
        others = any(craft.seen == title and craft.knowledge in ("bpda", "bpda_learned") for craft in crafts)
        return probe_defense(images, perceive(shield, "full"), others=others)

    for shield in stage.shields:
        for name in stage.heads:
            where = f"{source} | {name} | {data} | {shield}"
            about = [c.id for craft in crafts for c in craft.cells if (c.defense, c.head) == (shield, name)]
            found += guarded(where, about, lambda s=shield, h=name: forward(s, h))  # type: ignore[misc]
    for title in stage.shields:
        about = [c.id for craft in crafts for c in craft.cells if c.defense == title and c.knowledge == "full"]
        if about:
            found += guarded(f"{source} | {data} | {title}", about, lambda t=title: swallowed(t))  # type: ignore[misc]
    for title, held in stage.shields.items():
        about = [c.id for craft in crafts for c in craft.cells if c.defense == title]
        if about and held is not None and held.spec.detects and threat is not None:
            victim = stage.defended(title, next(iter(stage.heads)))
            where = f"{source} | {data} | {title}"
            found += guarded(where, about, lambda v=victim, t=threat: probe_detector(images, v, t))  # type: ignore[misc]
    views: dict[tuple[str, str, str | None], list[Craft]] = {}
    for craft in crafts:
        if registry.attacks[craft.attack.name].access in ("encoder", "whitebox") and craft.threat.radius > 0:
            views.setdefault((craft.seen, craft.knowledge, craft.head), []).append(craft)
    for (shield, knowledge, seen_head), alike in views.items():
        shown = shield if shield == UNDEFENDED else f"{shield}:{knowledge}"
        where = f"{source} | {seen_head or 'features'} | {data} | {shown}"
        about = [cell.id for craft in alike for cell in craft.cells]
        found += guarded(where, about, lambda c=alike[0]: backward(c))  # type: ignore[misc]
    return found
