"""`rbx gate`: judge a finished run by a policy."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["gate"]


def gate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    policy: Annotated[Path, typer.Option(help="Gate policy (TOML).")],
    baseline: Annotated[Path | None, typer.Option(help="Run to compare with, sample by sample.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Unreliable evaluations end with exit code 4.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
) -> None:
    """Judge a finished run by a policy; the exit code is the verdict."""
    from rich.console import Console

    from robustbench_x.cli._publish import verdict_holds, write_step_summary
    from robustbench_x.gate import check_baseline, decide, judge_gates
    from robustbench_x.policy import load_policy
    from robustbench_x.report.terminal import print_answer, print_gates
    from robustbench_x.result import read_report

    rules = load_policy(policy)
    report = read_report(run)
    if baseline is not None:
        check_baseline(baseline)
    verdicts = judge_gates(report, rules, run=run, baseline=baseline)
    decision = decide(report, verdicts, fail_on=rules.reliability.fail_on, strict=strict)
    report = report.model_copy(update={"gates": verdicts, "decision": decision})
    write_step_summary(report, decision)
    with verdict_holds():
        if as_json:
            import json

            document = {**decision.model_dump(), "gates": [verdict.model_dump() for verdict in verdicts]}
            typer.echo(json.dumps(document, indent=2))
        else:
            console = Console()
            print_answer(decision, console)
            print_gates(verdicts, console)
    raise typer.Exit(decision.exit_code)
