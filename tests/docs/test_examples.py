"""The examples run as their comments say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from robustbench_x.result import read_report

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_model_fails_its_gate(tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLES / "own_model", tmp_path / "own_model")
    done = subprocess.run(
        [sys.executable, "-m", "robustbench_x", "audit", "audit.toml", "--policy", "gate.toml", "--out", "run"],
        cwd=folder,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("Safe to ship? NO")
    report = read_report(folder / "run")
    assert report.decision is not None
    assert report.decision.exit_code == 1
    assert {cell.head for cell in report.cells} == {"linear", "prototype"}
    assert all(cell.metrics["clean_accuracy"].value > 0.5 for cell in report.cells)  # type: ignore[operator]


def test_the_ci_example_uses_commands_that_exist() -> None:
    text = (EXAMPLES / "ci" / "github.yml").read_text(encoding="utf-8")
    assert "rbx audit audit.toml --policy gate.toml --strict --out run" in text
