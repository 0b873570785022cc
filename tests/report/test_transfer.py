"""Surrogate x victim matrices of results made by hand, against a loop over the cells, and as the views show them."""

import io
import itertools
import random
import re
from fractions import Fraction

import pytest
from rich.console import Console

from made_runs import cell, fit_info, report
from robustbench_x.gate import decide
from robustbench_x.report.markdown import render_markdown
from robustbench_x.report.terminal import print_report
from robustbench_x.report.transfer import TransferMatrix, transfer_matrices
from robustbench_x.result import CellResult, Measure, Report

ONE, TWO, THREE = "toy:one", "toy:two", "toy:three"


def attacked(
    surrogate: str,
    victim: str,
    flips: int,
    *,
    head: str = "linear",
    data: str = "toy:data",
    defense: str = "none",
    eps: float = 4 / 255,
    plugin: str = "advencoder",
    steps: int = 40,
) -> CellResult:
    """A cell of `victim` in which a pattern fitted on `surrogate` flips `flips` of 100 predictions."""
    return cell(
        f"{plugin} from {surrogate}",
        encoder=victim,
        head=head,
        data=data,
        defense=defense,
        knowledge="none" if defense == "none" else "unaware",
        eps=eps,
        hits={"flip_rate": (flips, 100)},
        fit=fit_info(surrogate, plugin=plugin, eps=eps, params={"steps": steps}),
    )


def only(*cells: CellResult) -> TransferMatrix:
    (matrix,) = transfer_matrices(report(*cells))
    return matrix


def on_terminal(result: Report, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_report(result, decide(result, None, fail_on=()), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def in_markdown(result: Report) -> str:
    return render_markdown(result, decide(result, None, fail_on=()))


def section(text: str, start: str) -> list[str]:
    """The lines of `text` from the one that begins with `start` to the next title, without empty ones."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(start))
    rest = itertools.takewhile(lambda line: not line.startswith(("#", "<details>")), lines[first + 1 :])
    return [lines[first], *(line for line in rest if line)]


def test_the_matrix_equals_a_loop_over_the_cells() -> None:
    draw = random.Random(0)
    choices = itertools.product(
        (ONE, TWO), (ONE, TWO, THREE), ("linear", "knn", "mlp"), ("toy:data", "toy:more"), ("none", "jpeg")
    )
    chosen = [(where, draw.randrange(101)) for where in choices if draw.random() < 0.8]
    cells = [
        attacked(surrogate, victim, flips, head=head, data=data, defense=defense)
        for (surrogate, victim, head, data, defense), flips in chosen
    ]
    matrix = only(cell("pgd", hits={"flip_rate": (99, 100)}), *cells)
    for surrogate, victim in itertools.product((ONE, TWO), (ONE, TWO, THREE)):
        rates = [
            Fraction(flips, 100)
            for where, flips in chosen
            if (where[0], where[1], where[4]) == (surrogate, victim, "none")
        ]
        assert len(rates) > 1, "the premise: means over several cells"
        assert matrix.flip_rate[surrogate, victim] == pytest.approx(float(sum(rates) / len(rates)), abs=1e-12)
    assert len(matrix.flip_rate) == 6


def test_an_attack_that_met_its_own_encoder_alone_has_no_matrix() -> None:
    assert transfer_matrices(report()) == ()
    assert transfer_matrices(report(cell(), cell("noise", control=True))) == ()
    own = [attacked(name, name, 50, head=head) for name in (ONE, TWO) for head in ("linear", "knn")]
    assert transfer_matrices(report(*own)) == ()
    assert transfer_matrices(report(*own, attacked(ONE, TWO, 20))) != ()


def test_a_pair_that_was_not_audited_is_absent() -> None:
    matrix = only(attacked(ONE, ONE, 90), attacked(ONE, THREE, 10), attacked(TWO, ONE, 30))
    assert (matrix.fitted_on, matrix.victims) == ((ONE, TWO), (ONE, THREE))
    assert matrix.flip_rate == {(ONE, ONE): 0.9, (ONE, THREE): 0.1, (TWO, ONE): 0.3}


def test_defended_cells_are_left_out() -> None:
    defended = attacked(ONE, TWO, 90, defense="jpeg")
    assert transfer_matrices(report(attacked(ONE, ONE, 50), defended)) == ()
    matrix = only(attacked(ONE, TWO, 20), defended, attacked(ONE, THREE, 70, defense="jpeg"))
    assert matrix.flip_rate == {(ONE, TWO): 0.2}
    assert matrix.victims == (TWO,)


def test_what_was_not_measured_is_not_averaged() -> None:
    broken = attacked(ONE, TWO, 0, head="knn")
    broken = broken.model_copy(update={"metrics": {**broken.metrics, "flip_rate": Measure(value=None)}})
    matrix = only(attacked(ONE, TWO, 40), broken)
    assert matrix.flip_rate == {(ONE, TWO): 0.4}
    assert transfer_matrices(report(attacked(ONE, ONE, 40), broken)) == ()


def test_every_attack_budget_and_setting_has_a_matrix_of_its_own() -> None:
    cells = [
        attacked(ONE, TWO, 10),
        attacked(ONE, TWO, 20, eps=8 / 255),
        attacked(ONE, TWO, 30, plugin="xtransfer"),
        attacked(ONE, TWO, 40, steps=80),
        attacked(ONE, TWO, 50, head="knn"),
        attacked(ONE, ONE, 60, plugin="uap"),
    ]
    matrices = transfer_matrices(report(*cells))
    assert [matrix.title for matrix in matrices[:3]] == [
        "advencoder, linf 4/255",
        "advencoder, linf 8/255",
        "xtransfer, linf 4/255",
    ]
    assert [matrix.flip_rate[ONE, TWO] for matrix in matrices] == pytest.approx([0.3, 0.2, 0.3, 0.4])


def test_encoders_are_told_apart_by_weights_and_input_size() -> None:
    own = attacked(ONE, ONE, 60)
    assert own.fit is not None

    def fitted(like: CellResult, **changes: object) -> CellResult:
        assert like.fit is not None
        return like.model_copy(update={"fit": like.fit.model_copy(update=changes)})

    renamed = {"encoder": "elsewhere:one"}
    assert transfer_matrices(report(fitted(own, **renamed))) == ()
    matrix = only(fitted(own, **renamed), fitted(attacked(ONE, TWO, 20), **renamed))
    assert matrix.flip_rate == {(ONE, ONE): 0.6, (ONE, TWO): 0.2}
    for changes in ({"encoder_sha256": "0" * 64}, {"input_size": (32, 32)}):
        matrix = only(fitted(own, **renamed, **changes))
        assert matrix.flip_rate == {("elsewhere:one", ONE): 0.6}


def test_markdown_shows_the_matrix() -> None:
    result = report(
        attacked(ONE, ONE, 91),
        attacked(ONE, TWO, 17),
        attacked(ONE, TWO, 34, head="knn"),
        attacked(THREE, TWO, 5),
    )
    assert section(in_markdown(result), "### Transfer") == [
        "### Transfer: advencoder, linf 4/255",
        "Mean flip rate over heads and data sets, undefended.",
        "| fitted on, against | toy:one | toy:two |",
        "|---|---|---|",
        "| toy:one | 91 % | 26 % |",
        "| toy:three | - | 5 % |",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_shows_the_matrix(width: int) -> None:
    result = report(attacked(ONE, ONE, 91), attacked(ONE, TWO, 17), attacked(THREE, TWO, 5))
    lines = on_terminal(result, width).splitlines()
    first = lines.index("Transfer: advencoder, linf 4/255")
    shown = [re.split(r"\s{2,}", line.strip()) for line in lines[first + 1 :]]
    assert shown[0] == ["mean flip rate over heads and data sets, undefended"]
    assert ["fitted on, against", ONE, TWO] in shown
    assert [ONE, "91 %", "17 %"] in shown
    assert [THREE, "-", "5 %"] in shown
    assert max(map(len, lines)) <= width


def test_views_without_transfer_say_nothing_of_it() -> None:
    for result in (report(cell()), report(attacked(ONE, ONE, 50))):
        assert "Transfer" not in in_markdown(result)
        assert "Transfer" not in on_terminal(result)


def test_markdown_says_once_what_was_fitted() -> None:
    other = fit_info(TWO, sha256="d" * 64)
    cells = [
        cell("first", fit=fit_info(), head="linear"),
        cell("first", fit=fit_info(), head="knn"),
        cell("second", fit=other),
    ]
    shown = section(in_markdown(report(*cells)), "<details><summary>What was fitted")
    rows = [line.strip("| ").split(" | ") for line in shown if line.startswith("| ")][1:]
    assert [(row[0], row[1], row[-1]) for row in rows] == [("first", ONE, "c" * 64), ("second", TWO, "d" * 64)]
    assert "24 images of toy:surrogate" in rows[0]
    assert "40 steps, 2 s, 640 forward, 640 backward" in rows[0]
    assert "fitted for this run" in rows[0]
    assert "What was fitted" not in in_markdown(report(cell()))


@pytest.mark.parametrize(
    "name", ["a|b||c", "<script>x</script>", "[a](http://e.org) *d*", "a\nb\r| c |\n### e", "[red]x[/red]", "x" * 5000]
)
def test_hostile_names_stay_in_their_cells(name: str) -> None:
    result = report(attacked(name, name, 91, plugin=name), attacked(name, ONE, 17, plugin=name))
    text = in_markdown(result)
    shown = section(text, "### Transfer")
    assert len(shown) == 5
    assert {len(re.findall(r"\|", re.sub(r"\\.", "", line))) for line in shown[2:]} == {4}
    body = "\n".join(line for line in text.splitlines() if "<summary>" not in line)
    assert set(re.findall(r"<[^>]*>", body)) <= {"</details>"}
    assert not re.search(r"[`*~]|\]\(|\]\[|\]:", re.sub(r"\\.", "", body)), "Markdown that would be obeyed"
    screen = on_terminal(result, 80)
    assert all(c.isprintable() or c == "\n" for c in screen)
    if name.startswith("[red]"):
        assert "Transfer: [red]x[/red], linf 4/255" in screen


def test_retrieval_has_a_table_of_its_own() -> None:
    hits = {"clean_map@10": (80, 100), "map@10": (20, 100), "clean_recall@1": (90, 100), "recall@1": (30, 100)}
    ranked = cell("pgd", head="retrieval", task="retrieval", hits=hits)
    unranked = ranked.model_copy(update={"attack": "failed", "metrics": cell().metrics})
    rows = [line for line in section(in_markdown(report(cell(), ranked, unranked)), "### Retrieval") if "|" in line]
    assert len(rows) == 4
    assert rows[2].startswith("| toy:one on toy:data | none | pgd | linf 4/255 | 80 % to 20 % [")
    assert "| 90 % to 30 % [" in rows[2]
    assert "| failed | linf 4/255 | - to not measured | - to not measured | - to not measured |" in rows[3]
    assert "### Retrieval" not in in_markdown(report(cell()))

    screen = on_terminal(report(cell(), ranked, unranked)).splitlines()
    header = next(line for line in screen if "map@10" in line)
    assert header.split() == ["attack", "defence", "clean", "map@10", "recall@1", "clean@1", "s/img"]
    (row,) = (line for line in screen if "80 %" in line)
    assert re.split(r"\s{2,}", row.strip())[2:4] == ["80 %", "20 % [13, 29]"]
