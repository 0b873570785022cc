"""Commands on real runs: what they print, what they leave, and the code they end with."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import PIL.Image
import pytest

from command import Command
from made_runs import cell, report, row, store, worst
from robustbench_x.config import load_config
from robustbench_x.policy import load_policy
from robustbench_x.registry import load_registry
from robustbench_x.result import Finding, json_schema, read_report

COMMANDS = ("audit", "gate", "compare", "report", "list", "describe", "init", "doctor")
ENCODER = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net.input_size = 16
    return net

def probabilities():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(dim=1))
    net.input_size = 16
    net.classes = ["red", "green", "blue"]
    return net
"""
COLOURS = ("red", "green", "blue")


@pytest.fixture
def rbx(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    return Command(capsys, monkeypatch, tmp_path, module="tiny_user_code", columns=80)


def write_project() -> None:
    """A user's folder: an encoder of their own, and images that a linear head can tell apart."""
    Path("tiny_user_code.py").write_text(ENCODER)
    random = np.random.default_rng(0)
    for split, number in (("train", 8), ("test", 4)):
        for channel, name in enumerate(COLOURS):
            for index in range(number):
                pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                path = Path("data", split, name, f"{index}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(pixels).save(path)
    Path("audit.toml").write_text(
        'eps = "48/255"\n[[target]]\nencoder = "python:tiny_user_code:make"\ndata = "folder:data"\n'
        '[[attack]]\nname = "pgd"\nsteps = 5\n'
    )


def write_gate(name: str, **gate: Any) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in gate.items()]
    Path(name).write_text("[[gate]]\n" + "\n".join(lines) + "\n")
    return name


def test_an_audit_answers_by_print_code_and_file(rbx: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("summary.md").write_text("before\n")
    held = write_gate("held.toml", metric="clean_accuracy", min=0.4)
    failed = write_gate("failed.toml", metric="robust_accuracy", min=0.99, attack="pgd")
    for policy, code, answer, word in ((held, 0, "yes", "YES"), (failed, 1, "no", "NO")):
        ended = rbx("audit", "audit.toml", "--policy", policy, "--out", "run")
        assert ended.code == code, ended.out + ended.err
        assert ended.out.startswith(f"Safe to ship? {word}: ")
        assert f"(exit code {code})" in " ".join(ended.out.split())
        assert ended.out.splitlines()[-1] == "Results in run: report.md, report.json, samples.parquet"
        stored = read_report(Path("run"))
        assert stored.decision is not None
        assert (stored.decision.exit_code, stored.decision.answer) == (code, answer)
        assert [v.verdict for v in stored.gates] == ["pass" if code == 0 else "fail"]
        raw = json.loads(Path("run/report.json").read_text())
        schema = json.loads((files("robustbench_x") / "schema" / "report-1.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(raw)
        assert Path("run/report.md").read_text().startswith(f"### Safe to ship? {word}: ")
        assert Path("summary.md").read_text().endswith(Path("run/report.md").read_text() + "\n")
        again = rbx("gate", "run", "--policy", policy)
        assert again.code == code
        assert again.out.splitlines()[0] == ended.out.splitlines()[0]
        assert again.err == ""
    assert Path("summary.md").read_text().startswith("before\n### Safe to ship? YES")
    unjudged = rbx("audit", "audit.toml", "--out", "run")
    assert (unjudged.code, unjudged.out.partition(":")[0]) == (0, "Safe to ship? NOT JUDGED")
    assert load_config(Path("run/audit.toml")) == load_config(Path("audit.toml"))


def test_other_endings_of_real_audits(rbx: Command) -> None:
    write_project()
    gate = write_gate("gate.toml", metric="asr", max=1)
    nothing = rbx("audit", "audit.toml", "--shard", "99/99", "--out", "nothing")
    assert (nothing.code, nothing.out) == (5, "")
    assert "nothing to evaluate (shard 99/99)" in nothing.err

    native = ("-e", "python:tiny_user_code:probabilities", "-H", "native", "--eps", "2/255")
    doubtful = rbx("audit", "audit.toml", *native, "--policy", gate, "--out", "doubtful")
    assert doubtful.code == 4, doubtful.out
    assert doubtful.out.startswith("Safe to ship? UNKNOWN: the evaluation is unreliable: ")
    assert "not_logits" in doubtful.out
    assert rbx("audit", "audit.toml", *native, "--out", "doubtful").code == 0
    assert rbx("audit", "audit.toml", *native, "--out", "doubtful", "--strict").code == 4

    Path("data/test/red/0.png").write_bytes(b"no picture")
    broken = rbx("audit", "audit.toml", "--policy", gate, "--out", "broken")
    assert broken.code == 3, broken.out
    assert broken.out.startswith("Safe to ship? UNKNOWN: 2 of 24 judgements ended in an error (exit code 3)")


def test_the_schema_on_disk_is_that_of_the_code() -> None:
    shipped = json.loads((files("robustbench_x") / "schema" / "report-1.json").read_text(encoding="utf-8"))
    assert shipped == json_schema(), "run `make schema`"
    jsonschema.Draft202012Validator.check_schema(shipped)
    jsonschema.Draft202012Validator(shipped).validate(json.loads(report(cell()).model_dump_json()))


def test_help_is_instant_and_ends_with_0() -> None:
    script = f"""
import sys, io, contextlib
from robustbench_x.cli import main
for args in {[["--help"], ["--version"], *[[name, "--help"] for name in COMMANDS]]!r}:
    sys.argv = ["rbx", *args]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main()
    except SystemExit as stop:
        assert not stop.code, (args, stop.code)
    assert "Usage" in out.getvalue() or "robustbench_x " in out.getvalue(), args
heavy = {{"torch", "timm", "numpy", "pyarrow", "torchvision", "scipy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


KINDS = ("attacks", "defenses", "hardenings", "encoders", "heads", "data")


@pytest.mark.parametrize("kind", KINDS)
def test_list_prints_a_table_or_json(rbx: Command, kind: str) -> None:
    told = json.loads(rbx("list", kind, "--json").out)
    assert list(told) == [kind]
    assert [entry["name"] for entry in told[kind]] == list(getattr(load_registry(), kind))
    assert all(entry["from"] == "robustbench-x" and entry["summary"] for entry in told[kind])
    ended = rbx("list", kind)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(kind)
    assert max(map(len, ended.out.splitlines())) <= 80
    assert set(json.loads(rbx("list", "--json").out)) == set(KINDS)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("pgd", "attack", ["steps = 20 (int): gradient steps", "access: whitebox", "Madry et al. 2018"]),
        ("torchattacks:CW", "attack", ["budget: minimal", "from: robustbench-x"]),
        ("jpeg", "defense", ["quality = 75 (int)", "knowledge: oblivious, bpda, bpda_learned, full"]),
        ("fare", "hardening", ["eps: 4/255", "rate = ", "Schlarmann et al. 2024"]),
        ("linear", "head", ["name: linear"]),
        ("packaged:photos", "data source", ["names: digits, photos"]),
        ("packaged:efficientnet_lite0", "encoder source", ["dinov2_vits14"]),
        ("packaged", "encoder source", ["also: kind data source"]),
        ("timm:resnet18", "encoder source", ["usage: timm:NAME"]),
    ],
)
def test_describe_says_what_there_is(rbx: Command, name: str, kind: str, words: Sequence[str]) -> None:
    ended = rbx("describe", name)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"kind: {kind}\n")
    assert [word for word in words if word not in ended.out] == []
    told = json.loads(rbx("describe", name, "--json").out)
    assert told["kind"] == kind


def test_every_entry_can_be_described(rbx: Command) -> None:
    registry = load_registry()
    for name in (*registry.attacks, *registry.defenses, *registry.hardenings, *registry.heads):
        told = json.loads(rbx("describe", name, "--json").out)
        assert told["name"] == name


def test_doctor_says_what_is_here(rbx: Command) -> None:
    ended = rbx("doctor")
    assert (ended.code, ended.err) == (0, "")
    assert "torch: " in ended.out
    told = {check["name"]: check for check in json.loads(rbx("doctor", "--json").out)}
    assert told["plugins"]["ok"]
    assert told["plugins"]["found"].startswith(f"{len(load_registry().attacks)} attacks")


def test_init_writes_files_that_load(rbx: Command) -> None:
    ended = rbx("init", "new/project")
    assert (ended.code, ended.err) == (0, "")
    assert load_config(Path("new/project/audit.toml")).attack[0].name == "pgd"
    assert load_policy(Path("new/project/gate.toml")).gate[0].attack == "worst_case"
    Path("new/project/gate.toml").write_text("mine")
    assert rbx("init", "new/project").code == 2
    assert Path("new/project/gate.toml").read_text() == "mine"
    assert rbx("init", "new/project", "--force").code == 0
    assert load_policy(Path("new/project/gate.toml"))


def made_run(path: str, fooled: int, *, findings: Sequence[Finding] = ()) -> Path:
    made = cell(n=100, hits={"asr": (fooled, 100), "clean_accuracy": (100, 100)})
    rows: list[Mapping[str, Any]] = [row(made.id, i, adv=int(i < fooled)) for i in range(100)]
    return store(Path(path), report(made, worst_case=[worst((fooled, 100), like=made)], findings=findings), rows)


def test_gate_ends_with_the_code_of_its_verdict(rbx: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    doubt = Finding(id="zero_gradient", level="error", message="flat")
    made_run("good", 5)
    made_run("bad", 60)
    made_run("doubtful", 5, findings=[doubt])
    store(Path("unfinished"), report(cell(), status="incomplete"))
    store(Path("errors"), report(cell(errors=3)))
    store(Path("empty"), report())
    policy = write_gate("gate.toml", metric="asr", max=0.3)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    for run, code in {"good": 0, "bad": 1, "unfinished": 3, "errors": 3, "doubtful": 4}.items():
        ended = rbx("gate", run, "--policy", policy, "--json")
        told = json.loads(ended.out)
        assert (ended.code, told["exit_code"], ended.err) == (code, code, "")
        assert (told["answer"] == "yes") == (code == 0)
        assert told["gates"]
        printed = rbx("gate", run, "--policy", policy)
        assert printed.code == code
        assert f"(exit code {code})" in " ".join(printed.out.split())
    empty = rbx("gate", "empty", "--policy", policy)
    assert (empty.code, empty.out, empty.err.count("\n")) == (5, "", 1)
    assert Path("summary.md").read_text().count("### Safe to ship?") == 10


def test_gate_against_a_baseline(rbx: Command) -> None:
    made_run("old", 5)
    made_run("same", 5)
    made_run("worse", 30)
    Path("gate.toml").write_text("[baseline]\nmax_increase = { asr = 0.06 }\n")
    assert rbx("gate", "same", "--policy", "gate.toml", "--baseline", "old").code == 0
    ended = rbx("gate", "worse", "--policy", "gate.toml", "--baseline", "old")
    assert ended.code == 1
    assert "asr increase +0.250" in ended.out


def test_compare_tells_better_from_worse(rbx: Command) -> None:
    made_run("a", 5)
    made_run("b", 40)
    ended = rbx("compare", "a", "b")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("asr: 1 worse, 0 better, 0 cannot be told")
    (told,) = json.loads(rbx("compare", "b", "a", "--json").out)
    assert (told["verdict"], told["before"], told["after"]) == ("better", 0.4, 0.05)
    assert told["change"] == pytest.approx(-0.35)


def test_report_renders_a_stored_run_again(rbx: Command) -> None:
    run = made_run("run", 5)
    assert rbx("report", "run", "--format", "md").out.startswith("### Safe to ship? NOT JUDGED")
    assert json.loads(rbx("report", "run", "--format", "json").out) == json.loads((run / "report.json").read_text())
    rows = list(csv.DictReader(io.StringIO(rbx("report", "run", "--format", "csv").out)))
    assert {r["attack"] for r in rows} == {"pgd"}
    ended = rbx("report", "run", "--format", "csv", "--out", "cells.csv")
    assert (ended.code, ended.out) == (0, "")
    assert list(csv.DictReader(io.StringIO(Path("cells.csv").read_text()))) == rows


def test_a_full_step_summary_is_left_alone(rbx: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run("run", 5)
    policy = write_gate("gate.toml", metric="asr", max=0.3)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    for before in (999_950, 998_000):
        Path("summary.md").write_text("x" * before)
        assert rbx("gate", "run", "--policy", policy).code == 0
        assert before <= Path("summary.md").stat().st_size <= 1_000_000
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "no/such/folder/summary.md")
    ended = rbx("gate", "run", "--policy", policy)
    assert (ended.code, ended.err.count("\n")) == (3, 1)
