"""The registry, and a stranger's plugin package installed and run for real."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from robustbench_x.data.dataset import DataSource
from robustbench_x.encoders.source import EncoderSource
from robustbench_x.errors import PluginError, UnknownNameError
from robustbench_x.heads.base import HeadSpec
from robustbench_x.plugin import AttackSpec
from robustbench_x.registry import Registry, load_registry

PLUGIN = Path(__file__).parents[1] / "external_plugin"
REAL = load_registry()


def test_first_party_plugins_come_first_and_say_where_they_are_from() -> None:
    assert {"noise", "pgd", "apgd_ce", "apgd_t", "embed", "mifgsm"} <= set(REAL.attacks)
    assert {REAL.attacks.origin(name) for name in REAL.attacks} == {"robustbench-x"}
    assert REAL.defenses.origin("jpeg") == "robustbench-x"
    assert next(iter(REAL.attacks)) == "noise"


def test_a_taken_name_keeps_its_first_owner() -> None:
    registry = Registry()
    registry.load(lambda r: r.add_attack(REAL.attacks["pgd"]), origin="first")
    with pytest.raises(PluginError, match=r"plugin second: attack 'pgd' from second is already registered by first"):
        registry.load(lambda r: r.add_attack(REAL.attacks["pgd"]), origin="second")
    assert registry.attacks.origin("pgd") == "first"
    with pytest.raises(UnknownNameError, match="unknown attack 'pgdd'; did you mean pgd"):
        registry.attacks.origin("pgdd")


def test_things_of_the_wrong_kind_are_refused() -> None:
    registry = Registry()
    wrong: AttackSpec = REAL.defenses["jpeg"]  # type: ignore[assignment]
    with pytest.raises(PluginError, match="add_attack takes a AttackSpec, got DefenseSpec"):
        registry.add_attack(wrong)
    with pytest.raises(PluginError, match="head 'a b': a name is one word"):
        registry.add_head(HeadSpec(name="a b", summary="s"))
    packaged: EncoderSource = REAL.encoders["packaged"]
    with pytest.raises(PluginError, match="encoder source 'a:b': a name is one word"):
        registry.add_encoder(EncoderSource(scheme="a:b", usage="u", summary="s", load=packaged.load))
    with pytest.raises(PluginError, match="data source '': a name is one word"):
        registry.add_data(DataSource(scheme="", usage="u", summary="s", open=REAL.data["packaged"].open))


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(0), KeyError("x")])
def test_whatever_a_plugin_raises_is_named_after_it(error: BaseException) -> None:
    def register(_: Registry) -> None:
        raise error

    with pytest.raises(PluginError, match=f"plugin theirs failed to register: {type(error).__name__}"):
        Registry().load(register, origin="theirs")


def python(*args: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The external plugin, installed by pip into a folder of its own; no network."""
    work = tmp_path_factory.mktemp("external")
    copy = work / "source"
    _copy(PLUGIN, copy)
    done = python(
        "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir",
        "--disable-pip-version-check", "--target", str(work / "site"), str(copy),
        path=work, cwd=work,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return work / "site"


def _copy(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())


SCRIPT = """
import json, subprocess, sys
from robustbench_x.config import AuditConfig
from robustbench_x.engine import run_audit
from robustbench_x.catalogue import catalogue
from robustbench_x.registry import load_registry
from robustbench_x.testing import ATTACK_CHECKS, DEFENSE_CHECKS
from pathlib import Path

registry = load_registry()
for check in ATTACK_CHECKS:
    check(registry.attacks["example_fgsm"])
for check in DEFENSE_CHECKS:
    check(registry.defenses["example_dim"])
config = AuditConfig.model_validate({
    "target": [{"encoder": "python:tiny:make", "head": "linear", "data": "fractal:classes=2,train=6,test=4,size=16"}],
    "attack": [{"name": "example_fgsm", "scale": 0.5}],
    "defense": [{"name": "example_dim", "knowledge": ["full"]}],
    "eps": "8/255",
})
report = run_audit(config, Path("run"))
print(json.dumps({
    "listed": {kind: {e["name"]: e["from"] for e in entries} for kind, entries in catalogue(registry).items()},
    "cells": [[c.attack, c.defense, c.n_errors, c.params] for c in report.cells],
}))
"""
TINY = """
from torch import nn

def make():
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net.input_size = 16
    return net
"""


def test_a_strangers_plugin_keeps_the_contract_and_runs(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    done = python("-c", SCRIPT, path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["listed"]["attacks"]["example_fgsm"] == "rbx-example-plugin"
    assert told["listed"]["defenses"]["example_dim"] == "rbx-example-plugin"
    assert told["listed"]["attacks"]["pgd"] == "robustbench-x"
    assert ["example_fgsm", "example_dim", 0, {"scale": 0.5}] in told["cells"]


def test_a_plugin_is_listed_by_the_command_and_its_source_is_told(installed: Path, tmp_path: Path) -> None:
    done = python("-m", "robustbench_x", "list", "attacks", "--json", path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    entries = {entry["name"]: entry for entry in json.loads(done.stdout)["attacks"]}
    assert entries["example_fgsm"]["from"] == "rbx-example-plugin"


BROKEN = {
    "raises": "raise RuntimeError('boom')",
    "leaves": "import sys\nsys.exit(0)",
    "taken": "from robustbench_x.registry import load_registry\nimport robustbench_x_attacks.noise as n\n"
    "def register(registry):\n    registry.add_attack(n.SPEC)",
    "malformed": "from robustbench_x.plugin import AttackSpec\n"
    "def register(registry):\n    registry.add_attack(AttackSpec("
    "name='x', summary='s', factory=int, source='s', access='none'))",
    "no_function": "register = 3",
}
MESSAGES = {
    "raises": "cannot be imported: RuntimeError: boom; fix it or run: pip uninstall rbx-broken",
    "leaves": "cannot be imported: SystemExit: 0",
    "taken": "attack 'noise' from rbx-broken is already registered by robustbench-x",
    "malformed": "attack 'x': its factory must be a dataclass",
    "no_function": "failed to register: TypeError: 'int' object is not callable",
}


def test_a_broken_plugin_stops_everything_and_is_named(tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "rbx_broken-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rbx-broken\nVersion: 1\n")
    for kind, body in BROKEN.items():
        (site / f"rbx_broken_{kind}.py").write_text(body)
    # One process for all: the entry points are read anew, the way a fresh `rbx` reads them.
    script = f"""
import sys
from pathlib import Path
from robustbench_x.cli import main
from robustbench_x.registry import load_registry
for kind in {list(BROKEN)!r}:
    Path({str(info / "entry_points.txt")!r}).write_text(
        f"[robustbench_x.plugins]\\nmine = rbx_broken_{{kind}}:register\\n")
    load_registry.cache_clear()
    sys.argv = ["rbx", "list"]
    try:
        main()
    except SystemExit as stop:
        print(kind, stop.code, file=sys.stderr)
"""
    done = python("-c", script, path=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(BROKEN), done.stderr
    for kind, (message, code) in zip(BROKEN, zip(lines[::2], lines[1::2], strict=True), strict=True):
        assert code == f"{kind} 2"
        where = f"rbx: plugin rbx-broken (entry point mine = rbx_broken_{kind}:register)"
        assert message.startswith(where), message
        assert MESSAGES[kind] in message
