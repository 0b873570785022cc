"""`ladder`: the whole ladder of attackers beside the listed ones, replayable; who meets a defence at which level."""

from pathlib import Path
from typing import Any

import pytest

from command import Command
from robustbench_x.config import AuditConfig, default_config, ladder_attacks, load_config, override
from robustbench_x.errors import ConfigError
from robustbench_x.plan import make_plan
from robustbench_x.registry import load_registry
from robustbench_x.toml import parse_toml

REGISTRY = load_registry()
LADDER = [entry["name"] for entry in ladder_attacks()]
TARGET = {"encoder": "timm:a", "data": "packaged:digits"}


def _config(**changes: Any) -> AuditConfig:
    return AuditConfig.model_validate({"target": [TARGET], "attack": [{"name": "pgd"}], **changes})


def _names(config: AuditConfig) -> list[str]:
    return [entry.name for entry in config.attack]


def _levels(config: AuditConfig) -> dict[str, set[str]]:
    """The knowledge levels of each attack against the only defence."""
    found: dict[str, set[str]] = {}
    for cell in make_plan(config, REGISTRY).cells:
        if cell.defense != "none":
            found.setdefault(cell.attack, set()).add(cell.knowledge)
    return found


def test_the_ladder_climbs_from_a_control_to_white_box_attacks() -> None:
    assert len(set(LADDER)) == len(LADDER)
    access = {REGISTRY.attacks[name].access for name in LADDER}
    assert {"none", "encoder", "whitebox", "scores"} <= access
    for entry in ladder_attacks():
        REGISTRY.attacks[entry["name"]].build({k: v for k, v in entry.items() if k != "name"})


def test_it_adds_its_attacks_once_and_keeps_the_listed_ones() -> None:
    listed = [{"name": "pgd", "steps": 3}, {"name": "embed"}, {"name": "pgd", "label": "long pgd", "steps": 90}]
    config = _config(attack=listed, ladder=True)
    titles = [entry.title for entry in config.attack]
    assert titles[:3] == ["pgd", "embed", "long pgd"]
    assert sorted(titles) == sorted({*LADDER, "embed", "long pgd"})
    assert {entry.title: entry.params for entry in config.attack}["pgd"] == {"steps": 3}
    assert {entry.title: entry.params for entry in config.attack}["square"] == {"queries": 1000}
    assert config.ladder


def test_without_it_nothing_is_added() -> None:
    assert _names(_config()) == ["pgd"]
    assert _names(_config(ladder=False)) == ["pgd"]


def test_it_needs_no_other_attack() -> None:
    values = {"target": [TARGET], "ladder": True}
    assert _names(AuditConfig.model_validate(values)) == LADDER


def test_it_is_replayable(tmp_path: Path) -> None:
    config = _config(attack=[{"name": "pgd", "steps": 3}], ladder=True, defense=[{"name": "jpeg"}])
    assert parse_toml(config.to_toml(), AuditConfig, name="again") == config
    path = tmp_path / "audit.toml"
    path.write_text(config.to_toml())
    assert load_config(path) == config
    assert AuditConfig.model_validate(config.model_dump()) == config
    again = load_config(path)
    assert make_plan(again, REGISTRY).fingerprint == make_plan(config, REGISTRY).fingerprint


def test_another_attack_list_is_another_audit() -> None:
    plain = _config(defense=[{"name": "jpeg"}])
    assert make_plan(plain, REGISTRY).fingerprint != make_plan(_config(ladder=True), REGISTRY).fingerprint


@pytest.mark.parametrize("value", ["true", 1, "yes"])
def test_what_only_looks_like_true_is_refused(value: Any) -> None:
    """It would otherwise be stored as true, with none of the ladder's attacks."""
    with pytest.raises(ValueError, match="ladder"):
        _config(ladder=value)


def test_an_attack_that_is_none_is_named_with_it_too() -> None:
    for wrong in ({"name": ["pgd"]}, {"label": "x"}, "pgd"):
        with pytest.raises(ValueError, match="attack"):
            _config(attack=[wrong], ladder=True)


def test_the_flag_adds_it_to_the_default_and_to_a_file() -> None:
    climbed = override(default_config(), from_file=False, settings={"ladder": True})
    assert set(LADDER) <= set(_names(climbed))
    kept = {entry.title: entry.params for entry in climbed.attack}
    assert all(kept[entry.title] == entry.params for entry in default_config().attack)
    base = _config(attack=[{"name": "pgd", "steps": 3}])
    climbed = override(base, from_file=True, settings={"ladder": True}, params=["square.queries=7", "pgd.loss=margin"])
    settings = {entry.title: entry.params for entry in climbed.attack}
    assert settings["pgd"] == {"steps": 3, "loss": "margin"}
    assert settings["square"] == {"queries": 7}
    assert sorted(settings) == sorted(LADDER)


def test_rbx_audit_knows_the_flag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A parameter of an attack that only the ladder brings is understood, and checked before anything is loaded."""
    rbx = Command(capsys, monkeypatch, tmp_path)
    climbs = rbx("audit", "--ladder", "-p", "square.rungs=7", "--out", "out")
    assert climbs.code != 0
    assert "square has no parameter 'rungs'" in climbs.err
    plain = rbx("audit", "-p", "square.rungs=7", "--out", "out")
    assert "this audit runs no 'square'" in plain.err


def test_named_attacks_still_come_with_the_ladder() -> None:
    climbed = override(_config(), from_file=True, attack=["embed"], settings={"ladder": True})
    assert sorted(_names(climbed)) == sorted({*LADDER, "embed"})


def test_every_attacker_meets_a_defence_at_every_level_he_can_have() -> None:
    assert _levels(_config(ladder=True, defense=[{"name": "jpeg"}])) == {
        "noise": {"oblivious"},
        "transfer": {"oblivious"},
        "uap": {"oblivious", "bpda", "bpda_learned", "full"},
        "pgd": {"oblivious", "bpda", "bpda_learned", "full"},
        "apgd_ce": {"oblivious", "bpda", "bpda_learned", "full"},
        "apgd_t": {"oblivious", "bpda", "bpda_learned", "full"},
        "square": {"full"},
        "random_search": {"full"},
    }


def test_an_imitation_is_for_the_ladder_or_where_it_is_listed() -> None:
    assert _levels(_config(defense=[{"name": "jpeg"}]))["pgd"] == {"oblivious", "bpda", "full"}
    listed = [{"name": "jpeg", "knowledge": ["bpda_learned"]}]
    assert _levels(_config(defense=listed)) == {"noise": {"oblivious"}, "pgd": {"bpda_learned"}}
    listed = [{"name": "jpeg", "knowledge": ["full"]}]
    assert _levels(_config(defense=listed, ladder=True))["pgd"] == {"full"}, "what is listed stays"


@pytest.mark.parametrize("name", ["mvg", "feature_squeezing"])
def test_only_an_attack_that_evades_meets_a_detector_knowingly(name: str) -> None:
    attacks = [{"name": "pgd"}, {"name": "mifgsm"}, {"name": "embed"}]
    levels = _levels(_config(attack=attacks, ladder=True, defense=[{"name": name}]))
    knowing = {"pgd", "mifgsm", "apgd_ce", "apgd_t"}
    assert {attack for attack, found in levels.items() if found == {"oblivious", "full"}} == knowing
    assert all(found == {"oblivious"} for attack, found in levels.items() if attack not in knowing)


def test_a_detector_has_no_imitation() -> None:
    with pytest.raises(ConfigError, match="mvg has no knowledge level bpda_learned"):
        make_plan(_config(defense=[{"name": "mvg", "knowledge": ["bpda_learned"]}]), REGISTRY)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, True])
def test_a_share_of_refused_images_lies_between_none_and_all(rate: Any) -> None:
    with pytest.raises(ValueError, match="refuse_rate"):
        _config(refuse_rate=rate)
    assert _config().refuse_rate == 0.05


@pytest.mark.parametrize(("norm", "eps"), [("linf", "4/255"), ("l2", 1.0), ("patch", 0.03)])
def test_it_can_be_planned_at_every_norm(norm: str, eps: Any) -> None:
    config = _config(ladder=True, norm=norm, eps=eps, defense=[{"name": "jpeg"}])
    assert set(_levels(config)) == {name for name in LADDER if norm in REGISTRY.attacks[name].norms}
    with pytest.raises(ConfigError, match="attack square has no norm 'patch'"):
        make_plan(_config(ladder=True, attack=[{"name": "square"}], norm="patch", eps=0.03), REGISTRY)
