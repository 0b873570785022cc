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

    from robustbench_x.cli._run import write_step_summary
    from robustbench_x.gate import decide, judge_gates, load_policy
    from robustbench_x.report.markdown import render_markdown
    from robustbench_x.report.terminal import print_gates
    from robustbench_x.report.words import headline
    from robustbench_x.result import read_report

    rules = load_policy(policy)
    report = read_report(run)
    verdicts = judge_gates(report, rules, run=run, baseline=baseline)
    report = report.model_copy(update={"gates": verdicts})
    decision = decide(report, verdicts, fail_on=rules.reliability.fail_on, strict=strict)
    write_step_summary(render_markdown(report, decision))
    if as_json:
        import json

        document = {
            "exit_code": decision.exit_code,
            "answer": decision.answer,
            "reason": decision.reason,
            "gates": [verdict.model_dump() for verdict in verdicts],
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        console = Console()
        console.print(headline(report, decision), markup=False)
        print_gates(verdicts, console)
    raise typer.Exit(decision.exit_code)
