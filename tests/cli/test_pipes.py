"""A reader who has had enough does not change a verdict."""

import subprocess
import sys
from pathlib import Path

from made_runs import cell, report, store


def test_a_closed_pipe_leaves_the_exit_code_of_the_verdict(tmp_path: Path) -> None:
    run = store(tmp_path / "run", report(cell(hits={"asr": (0, 100)})))
    for bound, code in (("max = 0.9", 0), ("min = 0.5", 1)):
        policy = tmp_path / f"{code}.toml"
        policy.write_text(f'[[gate]]\nmetric = "asr"\n{bound}\n', encoding="utf-8")
        command = f"{sys.executable} -m robustbench_x gate {run} --policy {policy} | true; exit ${{PIPESTATUS[0]}}"
        assert subprocess.run(["bash", "-c", command], check=False).returncode == code


def test_a_listing_cut_short_is_no_failed_gate() -> None:
    command = f"{sys.executable} -m robustbench_x list | head -1; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", command], check=False, capture_output=True).returncode == 0
