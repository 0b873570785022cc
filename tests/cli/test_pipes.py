"""A reader who has had enough does not change a verdict."""

import signal
import subprocess
import sys
import time
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


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "own_model"
    audit = [sys.executable, "-m", "robustbench_x", "audit", "audit.toml", "--out", str(tmp_path / "run")]
    started = subprocess.Popen([*audit, "-p", "pgd.steps=100000"], cwd=example, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob(".state/*/*.parquet")):
        assert time.monotonic() < deadline, "the audit never began"
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130
    assert said.endswith("rbx: interrupted; run the same command again to continue\n")
