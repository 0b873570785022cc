"""Near matches, and the exit code that each error stands for."""

import pytest

from robustbench_x import errors
from robustbench_x.errors import MissingExtraError, RobustbenchError, UnknownNameError, near_matches


def test_every_error_has_the_exit_code_of_the_tree_in_its_module() -> None:
    codes = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, RobustbenchError)
    }
    assert set(codes) == {name for name in errors.__all__ if name.endswith("Error")}
    by_code: dict[int, set[str]] = {}
    for name, code in codes.items():
        by_code.setdefault(code, set()).add(name)
    assert by_code[2] == {
        "ConfigError", "DataError", "MissingExtraError", "PluginError", "SourceError", "UnknownNameError", "UsageError",
    }  # fmt: skip
    assert by_code[5] == {"NothingEvaluatedError"}
    assert {"RunError", "SampleError", "RobustbenchError"} <= by_code[3]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("pgdd", "did you mean pgd"), ("jpeg", "did you mean"), ("zzzzz", "'zzzzz'; available: apgd, jpg, pgd")],
)
def test_an_unknown_name_lists_near_matches_then_everything(name: str, hint: str) -> None:
    message = str(UnknownNameError("attack", name, ["pgd", "jpg", "apgd"]))
    assert hint in message
    assert message.endswith("available: apgd, jpg, pgd")


def test_a_long_list_of_names_is_not_printed() -> None:
    message = str(UnknownNameError("attack", "x", [f"name{i}" for i in range(31)]))
    assert message == "unknown attack 'x'; available: 31 names; `rbx list` prints them"


def test_a_missing_extra_prints_the_command() -> None:
    message = str(MissingExtraError("packaged:digits", package="scikit-learn", extra="packaged"))
    assert message == "packaged:digits needs the package scikit-learn: pip install 'robustbench-x[packaged]'"


def test_near_matches_are_at_most_three_best_first() -> None:
    assert near_matches("linear", ["linaer", "linears", "liner", "line", "zebra"])[0] == "linears"
    assert len(near_matches("attack1", [f"attack{i}" for i in range(9)])) == 3
