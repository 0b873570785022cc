"""Markdown, terminal and CSV of results made by hand, harmless whatever the names hold."""

import csv
import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from made_runs import cell, report, worst
from robustbench_x.gate import decide, judge_gates
from robustbench_x.policy import Policy
from robustbench_x.report.flat import render_csv
from robustbench_x.report.inert import html_text, markdown_text, plain, spreadsheet_text
from robustbench_x.report.markdown import LIMIT, render_markdown
from robustbench_x.report.terminal import print_gates, print_report
from robustbench_x.report.words import headline, summary
from robustbench_x.result import Collapse, Decision, Finding, Flag, Measure, Report

GOLDEN = Path(__file__).parents[1] / "golden"
NOTHING = Measure(value=None)
HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": '" onerror="alert(1)',
    "pipes": "a|b||c",
    "backticks": "a`b```c",
    "newlines": "a\nb\r\n\n| c | d |\n### e",
    "right_to_left": "a\u202eevil\u200f\u2066b",
    "long": "x" * 10_000,
    "emoji": "\U0001f600\U0001f469\u200d\U0001f52c",
    "ansi": "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b31m",
    "markup": "[red]x[/red][link=http://e.org]y[/link]",
    "emoji_code": "python:car:make :bomb:",
    "formula": '=HYPERLINK("http://e.org")',
    "markdown": "[a](http://e.org) ![b](c) *d* _e_ ~~f~~ @everyone \\| # g",
    "tab": "\t=1+1",
}


def made() -> tuple[Report, Decision]:
    flag = Flag(id="weaker_than_noise", level="error", message="9 samples broken by it are not broken here")
    cells = [
        cell("noise", control=True, hits={"asr": (4, 90), "clean_accuracy": (90, 100), "robust_accuracy": (86, 100)}),
        cell("pgd", hits={"asr": (81, 90), "clean_accuracy": (90, 100), "robust_accuracy": (9, 100)}),
        cell("pgd", defense="jpeg", knowledge="full", hits={"asr": (2, 88), "clean_accuracy": (88, 100)}, flags=[flag]),
        cell("pgd", head="knn", n=1, measures={"asr": Measure(value=None)}),
    ]
    result = report(
        *cells,
        worst_case=[worst((82, 90), like=cells[1]), worst((30, 88), like=cells[2])],
        findings=[
            Finding(id=flag.id, level=flag.level, message=flag.message, cell=cells[2].id),
            Finding(id="few_samples", level="note", message="1 correct sample", cell=cells[3].id),
        ],
        command="rbx audit --encoder toy:one",
    )
    policy = Policy.model_validate(
        {"gate": [{"metric": "asr", "max": 0.3, "attack": "worst_case"}, {"metric": "clean_accuracy", "min": 0.5,
                   "head": "linear"}]}
    )  # fmt: skip
    verdicts = judge_gates(result, policy)
    decision = decide(result, verdicts, fail_on=("error",))
    return result.model_copy(update={"gates": verdicts, "decision": decision}), decision


def on_terminal(result: Report, decision: Decision, width: int, *, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    print_report(result, decision, console)
    print_gates(result.gates, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("view", ["report.md", "terminal-80.txt", "terminal-120.txt", "report.csv"])
def test_views_are_as_they_were(view: str) -> None:
    """RBX_REGENERATE=1 writes the golden files again."""
    result, decision = made()
    texts = {
        "report.md": lambda: render_markdown(result, decision),
        "terminal-80.txt": lambda: on_terminal(result, decision, 80),
        "terminal-120.txt": lambda: on_terminal(result, decision, 120),
        "report.csv": lambda: render_csv(result),
    }
    lines = [line.rstrip() for line in texts[view]().splitlines()]
    text = "\n".join(lines) + "\n"
    if os.environ.get("RBX_REGENERATE"):
        (GOLDEN / view).write_text(text, encoding="utf-8")
    assert text == (GOLDEN / view).read_text(encoding="utf-8")


def test_every_view_opens_with_the_same_answer() -> None:
    result, decision = made()
    line = headline(decision)
    assert line.startswith("Safe to ship? NO: 2 of 4 gates failed, first: ")
    assert markdown_text(line, 600) in render_markdown(result, decision).splitlines()[0]
    screen = " ".join(on_terminal(result, decision, 80).split())
    assert screen.startswith(" ".join(line.split()))
    assert "fool 91 % [83, 95] of the 90 images it gets right" in summary(result)


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_on_a_terminal_is_wider_than_it(width: int) -> None:
    result, decision = made()
    assert max(map(len, on_terminal(result, decision, width).splitlines())) <= width


def hostile(name: str) -> tuple[Report, Decision]:
    nasty = cell(name, encoder=name, head=name, data=name, defense=name, knowledge=name)
    finding = Finding(id=name, level="error", message=name, cell=nasty.id)
    flag = Flag(id=name, level="warning", message=name)
    nasty = nasty.model_copy(update={"flags": (flag,)})
    result = report(nasty, worst_case=[worst(like=nasty)], findings=[finding], command=name)
    verdicts = judge_gates(result, Policy.model_validate({"gate": [{"metric": "asr", "min": 0.5}]}))
    decision = decide(result, verdicts, fail_on=())
    return result.model_copy(update={"gates": verdicts}), decision


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_are_only_text(name: str) -> None:
    result, decision = hostile(name)

    text = render_markdown(result, decision)
    tags = set(re.findall(r"<[^>]*>", text))
    assert tags <= {"<details>", "</details>", "<summary>", "</summary>"}
    body = "\n".join(line for line in text.splitlines() if "<summary>" not in line)  # Markdown is not read in there
    unescaped = re.sub(r"\\.", "", body)
    assert not re.search(r"[`*~]|\]\(|\]\[|\]:", unescaped), "Markdown that would be obeyed"
    assert not re.search(r"(?<!\w)@\w", text)
    assert len(text.encode()) < 40_000
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"\|", re.sub(r"\\.", "", line))) for line in tables}
    assert widths <= {3, 4, 6, 7, 9, 13}, "a name opened a new table column"
    assert all(c.isprintable() or c == "\n" for c in text)

    for colour in (False, True):
        screen = on_terminal(result, decision, 80, colour=colour)
        ours = re.sub(r"\x1b\[[0-9;]*m", "", screen) if colour else screen
        assert all(c.isprintable() or c == "\n" for c in ours)
        assert len(screen) < 60_000
        assert "\x1b]" not in screen
    if "[red]" in name:
        assert "[red]x[/red]" in "".join(screen.split())
    if ":bomb:" in name:
        assert ":bomb:" in ours

    rows = list(csv.reader(io.StringIO(render_csv(result))))
    assert {len(r) for r in rows} == {15}
    assert not [field for r in rows for field in r if field.startswith(("=", "+", "@", "\t", "\r"))]


def test_names_keep_what_is_harmless() -> None:
    name = "packaged:dinov2_vits14?size=98 timm:a@b.pth"
    assert plain(name) == markdown_text(name) == html_text(name) == spreadsheet_text(name) == name
    assert plain("a" * 200 + "b" * 200).endswith("b" * 100)
    assert len(plain("x" * 10_000)) <= 300
    assert html_text('<a href="x">') == "&lt;a href=&quot;x&quot;&gt;"


def test_markdown_cuts_itself_and_says_so() -> None:
    cells = [cell(f"attack{i}", encoder=f"toy:{i % 40}") for i in range(800)]
    result = report(*cells)
    decision = decide(result, None, fail_on=())
    whole = render_markdown(result, decision)
    assert len(whole.encode()) < LIMIT
    for limit in (300, 2_000, 20_000, 60_000):
        text = render_markdown(result, decision, limit=limit)
        assert len(text.encode()) <= limit
        assert text.endswith(f"left out to stay within {limit} bytes; everything is in report.json._\n")
    assert render_markdown(result, decision, limit=2_000).startswith("### Safe to ship? NOT JUDGED")


def test_markdown_names_the_class_that_absorbs_the_adversarial_images() -> None:
    collapse = Collapse(label=1, name="a|cat", share=Measure(value=0.75, low=0.6, high=0.9))
    absorbed = cell("absorbed").model_copy(update={"collapse": collapse})
    measures = {"feature_cosine": Measure(value=-0.126)}
    result = report(absorbed, cell("spread", measures=measures), cell("blind", measures={"feature_cosine": NOTHING}))
    rows = [line.split(" | ") for line in render_markdown(result, decide(result, None, fail_on=())).splitlines()]
    found = {row[1]: tuple(row[8:10]) for row in rows if len(row) == 12 and row[0] == "| none"}
    assert found == {"absorbed": (r"a\|cat (75 %)", "1.50"), "spread": ("-", "-0.13"), "blind": ("-", "-")}


def test_csv_reads_back_with_the_numbers_in_full() -> None:
    result, _ = made()
    rows = list(csv.DictReader(io.StringIO(render_csv(result))))
    assert len(rows) == sum(len(c.metrics) for c in result.cells)
    asr = next(r for r in rows if r["metric"] == "asr" and r["attack"] == "pgd" and r["defense"] == "none")
    assert float(asr["value"]) == 81 / 90
    unmeasured = next(r for r in rows if r["head"] == "knn" and r["metric"] == "asr")
    assert (unmeasured["value"], unmeasured["low"]) == ("", "")
