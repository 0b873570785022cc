"""The table of defences: what each is worth against everyone together, and what it costs."""

import io
from typing import Any

from rich.console import Console

from made_runs import cell, report, worst
from robustbench_x.gate import decide
from robustbench_x.report.defenses import COLUMNS, defense_tables
from robustbench_x.report.markdown import render_markdown
from robustbench_x.report.terminal import print_report
from robustbench_x.result import DefenseInfo, Measure, Report


def _info(defense: str, **changes: Any) -> DefenseInfo:
    values: dict[str, Any] = {
        "encoder": "toy:one", "data": "toy:data", "defense": defense, "name": defense, "params": {},
        "gradient": "exact", "stochastic": False, "detects": False, "seconds": 0.03, "encoder_seconds": 0.02,
    }  # fmt: skip
    return DefenseInfo(**{**values, **changes})


def _rates(clean: int, robust: int) -> dict[str, tuple[int, int]]:
    return {"clean_accuracy": (clean, 100), "robust_accuracy": (robust, 100), "asr": (clean - robust, clean)}


def _refusing(clean: float, attacked: float) -> dict[str, Measure]:
    return {"refused_clean": Measure(value=clean), "refused": Measure(value=attacked)}


def made(**infos: DefenseInfo) -> Report:
    """An undefended victim, `jpeg` in front of it, and a detector."""
    none = cell("pgd", hits=_rates(90, 5))
    blind = cell("pgd", defense="jpeg", knowledge="oblivious", hits=_rates(86, 70))
    universal = cell("uap", defense="jpeg", knowledge="oblivious", hits=_rates(86, 61))
    noise = cell("noise", defense="jpeg", knowledge="oblivious", control=True, hits=_rates(86, 40))
    full = cell("pgd", defense="jpeg", knowledge="full", hits=_rates(86, 20))
    quiet = cell("pgd", defense="gate", knowledge="oblivious", hits=_rates(88, 80), measures=_refusing(0.04, 0.75))
    evading = cell("pgd", defense="gate", knowledge="full", hits=_rates(88, 10), measures=_refusing(0.04, 0.02))
    shaken = cell(
        "noise", defense="gate", knowledge="oblivious", control=True, hits=_rates(88, 88), measures=_refusing(0.04, 1.0)
    )
    cells = (none, noise, blind, universal, full, shaken, quiet, evading)
    cases = [worst((85, 90), like=none), worst((68, 86), like=full), worst((79, 88), like=evading)]
    known = {"jpeg": _info("jpeg"), "gate": _info("gate", detects=True), **infos}
    return report(*cells, worst_case=cases).model_copy(update={"defenses": tuple(known.values())})


def _rows(result: Report) -> dict[str, dict[str, str]]:
    (table,) = defense_tables(result)
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in table.rows}


def test_a_defence_is_worth_its_worst_case_and_costs_clean_accuracy_and_time() -> None:
    (table,) = defense_tables(made())
    assert table.victim == "toy:one + linear head on toy:data"
    assert [row[0] for row in table.rows] == ["none", "jpeg", "gate"]
    rows = _rows(made())
    assert rows["jpeg"] == {
        "defence": "jpeg",
        "budget": "linf 4/255",
        "worst case": "18 % [12, 27]",
        "oblivious only": "61 %",
        "clean": "86 %",
        "cost": "+4 points",
        "time": "1.5 x",
        "refused clean / attacked": "",
    }
    assert rows["none"]["worst case"].startswith("5 % [")
    assert (rows["none"]["oblivious only"], rows["none"]["cost"], rows["none"]["time"]) == ("-", "", "")
    assert rows["none"]["clean"] == "90 %"


def test_only_oblivious_attacks_count_as_such_and_noise_is_none() -> None:
    assert _rows(made())["jpeg"]["oblivious only"] == "61 %", "not noise at 40 %, nor the full attack at 20 %"


def test_a_detector_shows_whom_it_refuses() -> None:
    assert _rows(made())["gate"]["refused clean / attacked"] == "4 % / 2 % to 75 %"


def test_time_that_nobody_measured_is_said_to_be_so() -> None:
    assert _rows(made(jpeg=_info("jpeg", seconds=None)))["jpeg"]["time"] == "not measured"
    assert _rows(made(jpeg=_info("jpeg", encoder_seconds=None)))["jpeg"]["time"] == "not measured"
    assert _rows(made(jpeg=_info("jpeg", data="toy:other")))["jpeg"]["time"] == "", "another data set's"


def test_a_cell_of_errors_hides_no_clean_accuracy() -> None:
    """The first cell of a defence may be one that failed altogether."""
    result = made()
    nothing = {"clean_accuracy": Measure(value=None), "robust_accuracy": Measure(value=None)}
    failed = cell("broken", errors=100, measures=nothing)
    behind = cell("broken", defense="jpeg", knowledge="oblivious", errors=100, measures=nothing)
    rows = _rows(result.model_copy(update={"cells": (failed, behind, *result.cells)}))
    assert (rows["jpeg"]["clean"], rows["jpeg"]["cost"]) == ("86 %", "+4 points")
    assert rows["jpeg"]["oblivious only"] == "61 %"


def test_budgets_and_victims_are_kept_apart() -> None:
    result = made()
    larger = cell("pgd", defense="jpeg", knowledge="oblivious", eps=8 / 255, hits=_rates(86, 12))
    others = cell("pgd", encoder="toy:two", defense="jpeg", knowledge="oblivious", hits=_rates(50, 49))
    both = result.model_copy(
        update={
            "cells": (*result.cells, larger, others),
            "worst_case": (*result.worst_case, worst((80, 86), like=larger), worst((1, 50), like=others)),
        }
    )
    first, second = defense_tables(both)
    assert [(row[0], row[1], row[3]) for row in first.rows] == [
        ("none", "linf 4/255", "-"),
        ("jpeg", "linf 4/255", "61 %"),
        ("gate", "linf 4/255", "80 %"),
        ("jpeg", "linf 8/255", "12 %"),
    ]
    assert [(row[0], row[3], row[5]) for row in second.rows] == [("jpeg", "49 %", "-")], "no control, no cost"


def test_a_victim_without_a_defence_has_no_table() -> None:
    bare = cell("pgd")
    result = report(bare, worst_case=[worst(like=bare)])
    assert defense_tables(result) == ()
    assert "Defences of" not in render_markdown(result, decide(result, None, fail_on=()))


def test_the_table_is_in_markdown() -> None:
    result = made()
    text = render_markdown(result, decide(result, None, fail_on=()))
    section = text[text.index("### Defences of toy:one + linear head on toy:data") :]
    assert f"| {' | '.join(COLUMNS)} |" in section
    jpeg, gate = (next(line for line in section.splitlines() if line.startswith(f"| {n} |")) for n in ("jpeg", "gate"))
    assert jpeg == "| jpeg | linf 4/255 | 18 % [12, 27] | 61 % | 86 % | +4 points | 1.5 x |  |"
    assert gate.endswith("| 1.5 x | 4 % / 2 % to 75 % |")


def _screen(result: Report, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(result, decide(result, None, fail_on=()), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_is_on_the_terminal_and_fits() -> None:
    section = _screen(made())
    section = section[section.index("Defences of toy:one + linear head on toy:data") :]
    jpeg = next(line for line in section.splitlines() if line.split()[:1] == ["jpeg"])
    assert " ".join(jpeg.split()) == "jpeg linf 4/255 18 % [12, 27] 61 % 86 % +4 points 1.5 x"
    assert max(map(len, _screen(made(), 80).splitlines())) <= 80


def test_columns_that_nobody_fills_are_left_out_on_the_terminal() -> None:
    result = made()
    without = [c for c in result.cells if c.defense != "gate"]
    cases = [w for w in result.worst_case if w.defense != "gate"]
    bare = result.model_copy(update={"cells": tuple(without), "worst_case": tuple(cases), "defenses": ()})
    section = _screen(bare)
    section = section[section.index("Defences of") :]
    assert "refused" not in section
    heading = next(line for line in section.splitlines() if line.split()[:1] == ["defence"])
    assert "time" not in heading
    assert "worst case" in heading
