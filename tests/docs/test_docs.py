"""What the documentation shows is run: snippets, commands, tables."""

import os
import re
import shlex
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer.main

from robustbench_x.cli import app
from robustbench_x.config import AuditConfig
from robustbench_x.encoders.source import load_encoder
from robustbench_x.findings import FINDINGS, render_page
from robustbench_x.fitting.harden import find_inner
from robustbench_x.metrics import METRICS
from robustbench_x.plan import make_plan
from robustbench_x.registry import Registry, load_registry
from robustbench_x.testing import ATTACK_CHECKS, HARDENING_CHECKS
from robustbench_x.threat import ThreatModel
from robustbench_x.toml import parse_toml

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def _blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@contextmanager
def _package(code: str) -> Iterator[Registry]:
    """What a page's plugin registers."""
    module = types.ModuleType("my_package")
    sys.modules["my_package"] = module
    try:
        exec(compile(code, "docs/plugins.md", "exec"), module.__dict__)
        registry = Registry()
        registry.load(module.register, origin="docs")
        yield registry
    finally:
        del sys.modules["my_package"]


def test_the_plugin_page_s_attack_keeps_the_contract() -> None:
    with _package(_blocks("docs/plugins.md", "python")[0]) as registry:
        for check in ATTACK_CHECKS:
            check(registry.attacks["halfway"])


def test_the_plugin_page_s_hardening_keeps_the_contract() -> None:
    with _package(_blocks("docs/plugins.md", "python")[1]) as registry:
        for check in HARDENING_CHECKS:
            check(registry.hardenings["absolute"])


def test_the_own_model_page_s_network_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(_blocks("docs/audit_your_model.md", "python")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_encoder("python:my_models:make", load_registry())
    assert loaded.encoder.input_size == (96, 96)
    assert loaded.classifier is not None
    assert loaded.classifier.aliases["dog"] == 1
    with torch.no_grad():
        assert loaded.classifier(loaded.encoder(torch.rand(2, 3, 96, 96))).shape == (2, 2)


def _commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"^\$ (rbx .*?)(\s{2,}#.*)?$", line):
                found.append((page.name, match[1]))
    return found


def test_there_are_commands_to_check() -> None:
    assert len(_commands()) >= 4


@pytest.mark.parametrize(("page", "command"), _commands())
def test_every_shown_command_has_those_options(page: str, command: str) -> None:
    _, name, *arguments = shlex.split(command)
    group = typer.main.get_command(app)
    context = group.make_context("rbx", ["--version"], resilient_parsing=True)
    found = group.get_command(context, name)  # type: ignore[attr-defined]
    assert found is not None, f"{page}: rbx {name}"
    found.make_context(name, arguments, resilient_parsing=False)


@pytest.mark.parametrize(("page", "command"), _commands())
def test_no_shell_expands_a_shown_command(page: str, command: str) -> None:
    bare = re.sub(r"'[^']*'", "", command)
    assert not re.search(r"\{[^}]*(,|\.\.)[^}]*\}|\*", bare), f"{page}: {command}"


def test_the_universal_page_s_transfer_audit_is_one() -> None:
    config = parse_toml(_blocks("docs/universal.md", "toml")[0], AuditConfig, name="docs/universal.md")
    plan = make_plan(config, load_registry())
    fitted = {(c.encoder, c.attack) for c in plan.cells if c.attack != "noise"}
    assert len(fitted) == 4


def test_the_hardening_page_s_audit_is_one() -> None:
    config = parse_toml(_blocks("docs/hardening.md", "toml")[0], AuditConfig, name="docs/hardening.md")
    plan = make_plan(config, load_registry())
    assert len({(c.encoder, c.attack) for c in plan.cells}) == 3 * 4
    named = re.findall(r"inner=([^']+)'", "".join(_blocks("docs/hardening.md", "console")))
    assert len(named) == 4
    registry = load_registry()
    for inner in named:
        find_inner(registry, registry.hardenings["fare"].build({"inner": inner}), ThreatModel(eps=4 / 255))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"^make ([a-z-]+)", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_findings_page_is_the_catalogue() -> None:
    page = ROOT / "docs" / "findings.md"
    if os.environ.get("RBX_REGENERATE"):
        page.write_text(render_page(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == render_page()
    assert all(f"## {name}\n" in page.read_text(encoding="utf-8") for name in FINDINGS)


def test_the_metrics_page_names_every_metric() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    missing = [name for name in METRICS if f"`{name}`" not in text]
    assert not missing


def test_the_readme_s_catalogue_is_the_registry_s() -> None:
    text, registry = (ROOT / "README.md").read_text(encoding="utf-8"), load_registry()
    native = [name for name in registry.attacks if not name.startswith("torchattacks:")]
    for name in [*native, *registry.defenses, *registry.hardenings, *registry.heads]:
        assert f"`{name}" in text, f"README.md does not name {name}"
    bridged = len(registry.attacks) - len(native)
    assert f"{bridged} of torchattacks" in text
