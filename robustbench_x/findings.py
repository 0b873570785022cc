"""The catalogue of findings: every doubt the harness can raise about an evaluation, with what to do about it."""

import math
import tomllib
from dataclasses import dataclass
from importlib.resources import files

from robustbench_x.result import Finding, Level

__all__ = ["CHECKS", "FINDINGS", "FindingKind", "finding", "render_page"]


@dataclass(frozen=True, kw_only=True)
class FindingKind:
    """A kind of finding. `error`: the figures it concerns cannot be trusted, or would flatter the defender.

    `measured` says which figure is taken, `threshold` where it becomes a finding (None: no single number), `check` its
    number in `CHECKS`.
    """

    level: Level
    title: str
    measured: str
    advice: str
    source: str
    threshold: float | None = None
    check: int | None = None


def _read() -> dict[str, FindingKind]:
    text = (files("robustbench_x") / "findings.toml").read_text(encoding="utf-8")
    return {name: FindingKind(**entry) for name, entry in tomllib.loads(text).items()}


FINDINGS: dict[str, FindingKind] = _read()

CHECKS: dict[int, str] = {
    1: "graph broken",
    2: "zero gradient",
    3: "NaN or infinity in outputs or gradients",
    4: "undeclared randomness",
    5: "no logits",
    6: "optimisation loop at inference",
    7: "too few classes for the DLR losses",
    8: "unstable loss",
    9: "gradient against finite differences",
    10: "preprocessor attenuates the gradient",
    11: "silent success",
    12: "incomplete optimisation",
    13: "iterations doubled",
    14: "restarts doubled",
    15: "iterations worse than one step",
    16: "accuracy rises with the budget",
    17: "unbounded attack fails",
    18: "black box beats white box",
    19: "per-example inversion",
    20: "transfer failure",
    21: "BPDA beats the true gradient",
    22: "random search",
    23: "randomness fixed",
    24: "enough draws averaged",
    25: "enough draws judged",
    26: "undefended control",
    27: "budget audited",
    28: "aggregation: `worst_case` is the mean over samples of the minimum over attacks, by construction",
    29: "clean cost: clean accuracy and runtime stand beside every robust figure",
}
"""The checks of honest evaluation that the literature asks for, by number."""


def finding(
    kind: str, message: str, cell: str | None = None, *, figure: float | None = None, level: Level | None = None
) -> Finding:
    """A finding of a known kind about `cell`, or about the run; `figure` is what was measured, `level` where it is not
    the kind's own."""
    known = FINDINGS[kind]
    return Finding(
        id=kind,
        level=level or known.level,
        message=message,
        cell=cell,
        # NaN and infinity are no JSON; the message says them.
        figure=figure if figure is not None and math.isfinite(figure) else None,
        threshold=known.threshold,
        source=known.source,
        advice=known.advice,
    )


def render_page() -> str:
    """The documentation's page of findings, as Markdown."""
    lines = [
        "# Findings",
        "",
        "Every doubt the harness can raise about an evaluation, with what is measured, the threshold, the source and",
        "what to do. `error`: the figures it concerns cannot be trusted; with a policy or `--strict` the run ends with",
        "exit code 4. `report.json` holds each finding with its figure. `rbx audit --strict` also runs the checks that",
        "attack again. This page is made from `robustbench_x/findings.toml` (`RBX_REGENERATE=1 make test`).",
        "",
        "## The checks of honest evaluation",
        "",
        "| # | check | findings |",
        "|---|---|---|",
    ]
    for number, title in CHECKS.items():
        names = [f"[{name}](#{name})" for name, kind in FINDINGS.items() if kind.check == number]
        lines.append(f"| {number} | {title} | {', '.join(names) or 'holds by construction'} |")
    for name, kind in FINDINGS.items():
        limit = "" if kind.threshold is None else f" Threshold: {kind.threshold:g}."
        number_text = "" if kind.check is None else f" Check {kind.check}."
        lines += [
            "",
            f"## {name}",
            "",
            f"**{kind.level}**: {kind.title}.",
            "",
            f"Measured: {kind.measured}{limit}",
            "",
            f"What to do: {kind.advice}",
            "",
            f"Source: {kind.source}.{number_text}",
        ]
    return "\n".join(lines) + "\n"
