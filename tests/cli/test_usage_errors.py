"""Everything a user can get wrong: one sentence on stderr, exit code 2, nothing on stdout, no folder left behind."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import pytest
import torch

from made_runs import cell, report, store
from robustbench_x.cli import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def rbx(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> Ended:
    """`rbx` in this process, by the very function that the command calls."""
    monkeypatch.setattr(sys, "argv", ["rbx", *args])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return Ended(code, *capsys.readouterr())


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


AUDIT = (
    '[[target]]\nencoder = "packaged:efficientnet_lite0"\nhead = "native"\ndata = "packaged:photos"\n\n'
    '[[attack]]\nname = "pgd"\n'
)
GATE = '[[gate]]\nmetric = "asr"\nmax = 0.3\n'
FILES = {
    "ok.toml": AUDIT,
    "syntax.toml": AUDIT + "steps = \n",
    "key.toml": "sampels = 3\n" + AUDIT,
    "type.toml": AUDIT.replace('name = "pgd"', "name = 3"),
    "value.toml": 'mode = "fast"\n' + AUDIT,
    "attack.toml": AUDIT.replace("pgd", "pgdd"),
    "param.toml": AUDIT + "stepz = 3\n",
    "ok_gate.toml": GATE,
    "metric.toml": GATE.replace("asr", "asrr"),
    "nothing.toml": GATE + 'attack = "pgdd"\n',
    "percent.toml": GATE.replace("0.3", "30"),
    "baseline.toml": "[baseline]\nmax_increase = { asr = 0.1 }\n",
    "taken": "",
    "other/file.txt": "",
}


def write_files() -> None:
    for name, text in FILES.items():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-e packged:efficientnet_lite0", "unknown encoder source 'packged'; did you mean packaged?"),
        ("-e packaged:efficientnet_lite", "unknown encoder 'packaged:efficientnet_lite'; did you mean packaged:eff"),
        ("-e efficientnet_lite0", "unknown encoder source 'efficientnet_lite0'; "),
        ("-d packaged:photo", "unknown data set 'packaged:photo'; did you mean packaged:photos or"),
        ("-d imagenet", "unknown data source 'imagenet'; "),
        ("-d folder:nowhere -H linear", "there is no folder"),
        ("-H linaer", "unknown head 'linaer'; did you mean linear?"),
        ("-a pgdd", "unknown attack 'pgdd'; did you mean pgd"),
        ("-D jpg", "unknown defense 'jpg'; did you mean jpeg?"),
        ("--eps 8", "--eps: eps=8 exceeds 1: pixels live in [0, 1], so write 8/255, not 8"),
        ("--eps eight", "--eps: 'eight' is not a number"),
        ("--norm linff", "--norm: input should be 'linf', 'l2' or 'patch' (got 'linff')"),
        ("--norm patch --eps 0.03 -a embed -a torchattacks:CW", "attack torchattacks:CW has no norm 'patch'; it has"),
        ("--samples 0", "--samples: input should be greater than 0 (got 0)"),
        ("--shard 5/4", "--shard: '5/4' is not a shard; write 1/4"),
        ("--batch-size some", "--batch-size: "),
        ("--precision fp8", "--precision: input should be 'fp32' or 'bf16'"),
        ("--device tpux", "--device tpux: choose auto, cpu"),
        ("--device cuda:99", "--device cuda:99: this machine has no such device"),
        ("--engine ray", "--engine ray: this version has only the local engine"),
        ("-p pgdsteps", "-p pgdsteps: write attack.param=value"),
        ("-p pg.steps=3", "this audit runs no 'pg'; it runs"),
        ("-p pgd.stepz=3", "pgd has no parameter 'stepz'; did you mean steps?"),
        ("-p pgd.steps=three", "pgd.steps='three': input should be a valid integer"),
        ("-p pgd.steps=0", "pgd: steps=0 must be at least 1"),
        ("-p pgd.name=noise", "pgd has no parameter 'name'"),
        ("nope.toml", "there is no file nope.toml; `rbx init` writes"),
        ("syntax.toml", "syntax.toml:8: key 'steps': not valid TOML, invalid value"),
        ("key.toml", "key.toml:1: unknown key 'sampels'; did you mean 'samples'?"),
        ("type.toml", "type.toml:7: key 'attack.1.name': input should be a valid string (got 3)"),
        ("value.toml", "value.toml:1: key 'mode': input should be 'verdict' or 'exhaustive' (got 'fast')"),
        ("attack.toml", "unknown attack 'pgdd'; did you mean pgd"),
        ("param.toml", "pgd has no parameter 'stepz'; did you mean steps?"),
        ("ok.toml --policy nope.toml", "there is no file nope.toml"),
        ("ok.toml --policy metric.toml", "metric.toml:2: key 'gate.1.metric': unknown metric 'asrr'; did you mean asr"),
        ("ok.toml --policy percent.toml", "percent.toml:3: key 'gate.1.max': asr is a rate between 0 and 1, not 30"),
        ("ok.toml --policy nothing.toml", "gate 1 (asr <= 0.3): no cell has attack = 'pgdd'; did you mean pgd?"),
        ("ok.toml --policy baseline.toml", "the policy has a [baseline]; name the run to compare with: --baseline"),
        ("ok.toml --policy baseline.toml --baseline gone", "--baseline gone: there is no such run"),
    ],
)
def test_rbx_audit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    write_files()
    ended = rbx(capsys, monkeypatch, "audit", *arguments.split(), "--out", "out")
    check(ended, message)
    assert not Path("out/report.json").exists()


def check(ended: Ended, message: str) -> None:
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert ended.err.startswith("rbx: ")
    assert ended.err.count("\n") == 1, ended.err
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_out_must_be_free(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_files()
    for out, message in {"taken": "this is a file", "other": "the folder holds something else"}.items():
        check(rbx(capsys, monkeypatch, "audit", "ok.toml", "--out", out), f"--out {out}: {message}")
    assert Path("other/file.txt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check(rbx(capsys, monkeypatch, "audit", "--device", "cuda", "--out", "out"), "--device cuda: this machine has no")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gate gone --policy ok_gate.toml", "there is no run at gone"),
        ("gate run --policy gone.toml", "there is no file gone.toml"),
        ("gate run --policy nothing.toml", "gate 1 (asr <= 0.3): no cell has attack = 'pgdd'; did you mean pgd?"),
        ("gate run --policy baseline.toml", "name the run to compare with"),
        ("gate run --policy ok_gate.toml --baseline gone", "--baseline gone: there is no such run"),
        ("compare run gone", "there is no run at gone"),
        ("compare run run --metric asrr", "'asrr' cannot be compared sample by sample; did you mean asr"),
        ("report gone --format md", "there is no run at gone"),
        ("report run --format md --out no/such/folder", "--out no/such/folder cannot be written"),
        ("describe pgdd", "unknown name 'pgdd'; did you mean pgd"),
        ("describe packaged:photo", "unknown name 'packaged:photo'; did you mean packaged:photos"),
        ("init", "audit.toml exists already; --force overwrites it"),
        ("init taken", "taken is a file; name a folder"),
    ],
)
def test_the_other_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    write_files()
    Path("audit.toml").write_text("mine")
    store(Path("run"), report(cell()))
    check(rbx(capsys, monkeypatch, *arguments.split()), message)
    assert Path("audit.toml").read_text() == "mine"


def test_a_damaged_run_is_exit_code_3(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_files()
    store(Path("run"), report(cell()))
    Path("run/report.json").write_text('{"schema_version": "1", "status": "complete"}')
    Path("half/.state").mkdir(parents=True)
    for run, message in {"run": "run/report.json: field run", "half": "half holds an interrupted audit"}.items():
        ended = rbx(capsys, monkeypatch, "gate", run, "--policy", "ok_gate.toml")
        assert (ended.code, ended.out, ended.err.count("\n")) == (3, "", 1)
        assert message in ended.err


def picture(path: Path, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (16, 16), (shade, 20, 200)).save(path)


def test_files_that_are_no_images_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(Path("data/ant/1.png"))
    Path("data/ant/notes.txt").write_text("x")
    ended = rbx(capsys, monkeypatch, "audit", "-d", "folder:data", "-H", "linear", "--out", "out")
    check(ended, "is not an image by suffix: ant/notes.txt")


def test_a_class_that_the_native_head_does_not_know_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tabby", "blorp"):
        for number in range(2):
            picture(Path(f"data/{name}/{number}.png"), shade=number)
    source = ("-e", "packaged:efficientnet_lite0", "-H", "native", "-d", "folder:data")
    ended = rbx(capsys, monkeypatch, "audit", *source, "-a", "pgd", "--out", "out")
    assert (ended.code, ended.out) == (2, "")
    assert "head native knows no class named blorp" in ended.err.splitlines()[-1]


def test_a_hub_model_without_a_network_offers_what_needs_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    ended = rbx(capsys, monkeypatch, "audit", "-e", "timm:resnet18", "-d", "packaged:digits", "--out", "out")
    check(ended, "timm:resnet18 needs a network that is not there; packaged:efficientnet_lite0")


def test_a_missing_extra_prints_the_command(tmp_path: Path) -> None:
    """In a fresh interpreter where the packages cannot be found, as on a machine that lacks them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torchattacks', 'foolbox', 'sklearn'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import importlib.util\n"
        "_find = importlib.util.find_spec\n"
        "def find_spec(name, package=None):\n"
        "    try:\n"
        "        return _find(name, package)\n"
        "    except ModuleNotFoundError:\n"
        "        return None\n"
        "importlib.util.find_spec = find_spec\n"
    )
    script = (
        "import sys\n"
        "from robustbench_x.cli import main\n"
        "for args in (['-a', 'torchattacks:PGD'], ['-d', 'packaged:photos'], ['-d', 'packaged:digits']):\n"
        "    sys.argv = ['rbx', 'audit', '--out', 'out' + args[1][-3:], *args]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as stop:\n"
        "        print(stop.code, file=sys.stderr)\n"
        "sys.argv = ['rbx', 'doctor']\n"
        "main()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    wanted = [
        "rbx: torchattacks:PGD needs the package torchattacks: pip install 'robustbench-x[torchattacks]'", "2",
        "rbx: packaged:photos needs the package foolbox: pip install 'robustbench-x[packaged]'", "2",
        "rbx: packaged:digits needs the package scikit-learn: pip install 'robustbench-x[packaged]'", "2",
    ]  # fmt: skip
    assert done.stderr.splitlines() == wanted
    assert "missing  foolbox: not installed; packaged:photos needs it" in done.stdout
    assert "fix: pip install 'robustbench-x[packaged]'" in done.stdout


def test_the_command_itself_ends_like_that(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "robustbench_x", "audit", "--eps", "8", "--out", "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    check(Ended(done.returncode, done.stdout, done.stderr), "write 8/255, not 8")
    assert list(tmp_path.iterdir()) == []
