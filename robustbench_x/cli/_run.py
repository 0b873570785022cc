"""What `rbx audit` does once its flags are read."""

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from robustbench_x.cli._progress import progress_on
from robustbench_x.cli._publish import publish, verdict_holds
from robustbench_x.config import AuditConfig
from robustbench_x.engine import run_audit
from robustbench_x.engine.run import resolve_device
from robustbench_x.errors import UnknownNameError
from robustbench_x.gate import check_baseline, check_policy, decide, judge_gates
from robustbench_x.plan import Plan, make_plan
from robustbench_x.policy import Policy, load_policy
from robustbench_x.registry import Registry, load_registry
from robustbench_x.report.terminal import print_report
from robustbench_x.report.words import count
from robustbench_x.store import stored_fingerprint

__all__ = ["RunRequest", "run_and_report"]


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """An audit with where it goes and what judges it."""

    config: AuditConfig
    out: Path | None
    policy: Path | None
    baseline: Path | None
    strict: bool
    resume: bool
    command: str


def run_and_report(request: RunRequest) -> int:
    """Runs, judges, stores and prints; returns the exit code. Everything that can be wrong is looked at first."""
    registry = load_registry()
    plan = make_plan(request.config, registry)
    policy = load_policy(request.policy) if request.policy else None
    _check_early(request, plan, policy, registry)
    out = request.out or _default_out(plan, resume=request.resume)
    with progress_on(Console(stderr=True), opening=f"{count(len(plan.cells), 'cell')} into {out}") as progress:
        report = run_audit(
            request.config, out, registry=registry, resume=request.resume, command=request.command, progress=progress
        )
    verdicts = judge_gates(report, policy, run=out, baseline=request.baseline) if policy else None
    fail_on = policy.reliability.fail_on if policy else ()
    decision = decide(report, verdicts, fail_on=fail_on, strict=request.strict)
    report = report.model_copy(update={"gates": verdicts or (), "decision": decision})
    publish(report, decision, out)
    with verdict_holds():
        console = Console()
        print_report(report, decision, console)
        console.print(Text(f"\nResults in {out}: report.md, report.json, samples.parquet"), soft_wrap=True)
    return decision.exit_code


def _check_early(request: RunRequest, plan: Plan, policy: Policy | None, registry: Registry) -> None:
    """Refuses what could not be judged or loaded, before a run folder exists."""
    resolve_device(request.config.device)
    for kind, sources in (("encoder", {s.encoder for s in plan.stages}), ("data set", {s.data for s in plan.stages})):
        for source in sorted(sources):
            scheme, _, rest = source.partition(":")
            known = (registry.encoders if kind == "encoder" else registry.data)[scheme].names
            if known and rest.partition("?")[0] not in known:
                raise UnknownNameError(kind, source, [f"{scheme}:{name}" for name in known])
    if request.baseline is not None:
        check_baseline(request.baseline)
    if policy is not None:
        controls = {entry.title for entry in request.config.attack if registry.attacks[entry.name].control} | {"noise"}
        check_policy(policy, plan.cells, controls=controls, has_baseline=request.baseline is not None)


def _default_out(plan: Plan, *, resume: bool) -> Path:
    """A new folder under `runs/`, or the newest unfinished run of this very audit."""
    runs = Path("runs")
    if resume and runs.is_dir():
        unfinished = [p for p in runs.iterdir() if (p / ".state" / "plan.json").exists()]
        same = [p for p in unfinished if stored_fingerprint(p) == plan.fingerprint]
        if same:
            return max(same, key=lambda p: p.name)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    encoder = plan.stages[0].encoder.partition(":")[2]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", encoder).strip("-.")[:60]
    return runs / f"{stamp}-{name}"
