"""What `rbx audit` does once its flags are read."""

import datetime
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from robustbench_x.config import AuditConfig
from robustbench_x.engine import run_audit
from robustbench_x.errors import RunError
from robustbench_x.gate import Policy, check_policy, decide, judge_gates, load_policy
from robustbench_x.plan import Plan, make_plan
from robustbench_x.registry import load_registry
from robustbench_x.report.markdown import render_markdown
from robustbench_x.report.terminal import print_report
from robustbench_x.result import Decision, Level, Report, write_report
from robustbench_x.store import stored_fingerprint, write_atomically

__all__ = ["RunRequest", "publish", "run_and_report"]


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
    """Runs, judges, stores and prints; returns the exit code."""
    console, progress_console = Console(), Console(stderr=True)
    registry = load_registry()
    plan = make_plan(request.config, registry)
    policy = load_policy(request.policy) if request.policy else None
    if policy is not None:
        controls = {entry.title for entry in request.config.attack if registry.attacks[entry.name].control} | {"noise"}
        check_policy(policy, plan.cells, controls=controls, has_baseline=request.baseline is not None)
    out = request.out or _default_out(plan, resume=request.resume)
    progress_console.print(f"{len(plan.cells)} cells into {out}", style="dim", markup=False, highlight=False)
    with _Bar(progress_console) as bar:
        report = run_audit(
            request.config, out, registry=registry, resume=request.resume, command=request.command, progress=bar
        )
    verdicts = judge_gates(report, policy, run=out, baseline=request.baseline) if policy else None
    report = report.model_copy(update={"gates": verdicts or ()})
    decision = decide(report, verdicts, fail_on=_fail_on(policy), strict=request.strict)
    report = report.model_copy(update={"decision": decision})
    publish(report, decision, out)
    print_report(report, decision, console)
    console.print(
        f"\nresults in {out}: report.md, report.json, samples.parquet", markup=False, highlight=False, soft_wrap=True
    )
    return decision.exit_code


def publish(report: Report, decision: Decision, run: Path) -> None:
    """Writes `report.json` and `report.md` into the run folder, and the Markdown to a CI's step summary."""
    write_report(report, run)
    markdown = render_markdown(report, decision)
    write_atomically(run / "report.md", markdown)
    write_step_summary(markdown)


def write_step_summary(markdown: str) -> None:
    """Appends `markdown` to the file that GITHUB_STEP_SUMMARY names, where it is set.

    Raises:
        RunError: The file cannot be written.
    """
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if not summary:
        return
    try:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(markdown + "\n")
    except OSError as error:
        raise RunError(f"GITHUB_STEP_SUMMARY={summary} cannot be written: {error}") from error


def _fail_on(policy: Policy | None) -> tuple[Level, ...]:
    return policy.reliability.fail_on if policy else ()


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


@final
class _Bar:
    """The engine's progress as a rich bar with the time left, on stderr."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, total: int, done: int) -> None:
        """See `Progress`."""
        self._progress.update(self._task, total=total, completed=done)

    def task(self, text: str) -> None:
        """See `Progress`."""
        self._progress.update(self._task, description=text.replace("[", "\\["))

    def advance(self, units: int) -> None:
        """See `Progress`."""
        self._progress.advance(self._task, units)

    def say(self, text: str) -> None:
        """See `Progress`."""
        self._progress.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
