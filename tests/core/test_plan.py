"""The matrix: which cells an audit has, what is crafted once, and what makes two audits the same."""

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

import robustbench_x_attacks
import robustbench_x_defenses
from robustbench_x.builtin import register_builtins
from robustbench_x.config import AuditConfig
from robustbench_x.errors import ConfigError, UnknownNameError
from robustbench_x.plan import Plan, make_plan, with_noise
from robustbench_x.plugin import AttackSpec
from robustbench_x.registry import Registry
from robustbench_x.views import View


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Does nothing."""

    def run(self, view: View) -> Tensor:
        return view.inputs


def _registry() -> Registry:
    registry = Registry()
    register_builtins(registry)
    registry.load(robustbench_x_attacks.register, origin="robustbench-x")
    registry.load(robustbench_x_defenses.register, origin="robustbench-x")
    registry.add_attack(AttackSpec(name="scores", summary="s", factory=Planted, source="s", access="scores"))
    return registry


REGISTRY = _registry()
TARGET = {"encoder": ["timm:a"], "head": ["linear", "knn"], "data": ["packaged:digits"]}


def _config(**changes: Any) -> AuditConfig:
    return AuditConfig.model_validate({"target": [TARGET], "attack": [{"name": "pgd"}], **changes})


def _plan(**changes: Any) -> Plan:
    return make_plan(_config(**changes), REGISTRY)


def test_noise_comes_first_and_once() -> None:
    plain = _config(attack=[{"name": "pgd"}, {"name": "embed"}])
    assert [entry.title for entry in with_noise(plain.attack)] == ["noise", "pgd", "embed"]
    listed = _config(attack=[{"name": "pgd"}, {"name": "noise"}])
    assert [entry.title for entry in with_noise(listed.attack)] == ["noise", "pgd"]


def test_every_cell_is_there_once() -> None:
    plan = _plan(
        attack=[{"name": n} for n in ("pgd", "embed", "scores")], defense=[{"name": "jpeg"}], eps=["2/255", "4/255"]
    )
    ids = [cell.id for cell in plan.cells]
    assert len(ids) == len(set(ids))
    found = {(c.attack, c.defense, c.knowledge) for c in plan.cells}
    assert found == {
        (attack, "none", "none") for attack in ("noise", "pgd", "embed", "scores")
    } | {("noise", "jpeg", "oblivious"), ("scores", "jpeg", "full")} | {
        (attack, "jpeg", level) for attack in ("pgd", "embed") for level in ("oblivious", "bpda", "full")
    }  # fmt: skip
    assert len(ids) == len(found) * 2 * 2, "two heads, two budgets"


def test_headless_attacks_are_crafted_once_for_all_heads() -> None:
    (stage,) = _plan(attack=[{"name": "pgd"}, {"name": "embed"}], defense=[{"name": "jpeg"}]).stages
    crafts = {(c.attack.title, c.seen, c.knowledge, c.head): c for c in stage.crafts}
    assert set(crafts) == {
        ("noise", "none", "none", None),
        ("embed", "none", "none", None),
        ("embed", "jpeg", "bpda", None),
        ("embed", "jpeg", "full", None),
        *(("pgd", seen, level, head) for head in ("linear", "knn")
          for seen, level in (("none", "none"), ("jpeg", "bpda"), ("jpeg", "full"))),
    }  # fmt: skip
    blind = crafts["embed", "none", "none", None]
    assert {(c.head, c.defense, c.knowledge) for c in blind.cells} == {
        (head, *where) for head in ("linear", "knn") for where in (("none", "none"), ("jpeg", "oblivious"))
    }
    assert blind.exhaustive, "images that must also stand against a defence may not stop early"
    assert not crafts["embed", "jpeg", "full", None].exhaustive
    assert len({craft.id for craft in stage.crafts}) == len(stage.crafts)


def test_exhaustive_mode_is_exhaustive_everywhere() -> None:
    assert all(craft.exhaustive for craft in _plan(mode="exhaustive").stages[0].crafts)
    assert not any(craft.exhaustive for craft in _plan().stages[0].crafts)


def test_targets_are_merged_by_encoder_and_data() -> None:
    plan = _plan(target=[TARGET, {**TARGET, "head": ["prototype", "knn"]}, {**TARGET, "encoder": ["timm:b"]}])
    assert [(s.encoder, s.heads) for s in plan.stages] == [
        ("timm:a", ("linear", "knn", "prototype")),
        ("timm:b", ("linear", "knn")),
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attack": [{"name": "pdg"}]}, UnknownNameError, "did you mean pgd"),
        ({"attack": [{"name": "pgd", "stepz": 3}]}, ConfigError, "no parameter 'stepz'; did you mean steps"),
        ({"attack": [{"name": "pgd", "steps": 0}]}, ConfigError, "steps=0 must be at least 1"),
        ({"attack": [{"name": "scores"}], "norm": "l2", "eps": 1}, ConfigError, "has no norm 'l2'"),
        ({"defense": [{"name": "jpg"}]}, UnknownNameError, "did you mean jpeg"),
        ({"defense": [{"name": "jpeg", "quality": 200}]}, ConfigError, "must lie between 1 and 95"),
        ({"target": [{**TARGET, "head": ["liner"]}]}, UnknownNameError, "did you mean linear"),
        ({"target": [{**TARGET, "encoder": ["tim:a"]}]}, UnknownNameError, "did you mean timm"),
        ({"target": [{**TARGET, "data": ["foldr:x"]}]}, UnknownNameError, "did you mean folder"),
        ({"target": [{**TARGET, "samples": 3}, {**TARGET, "samples": 4}]}, ConfigError, "samples=3 and samples=4"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _plan(**changes)


def test_what_decides_the_numbers_decides_the_fingerprint() -> None:
    base = _plan().fingerprint
    same: list[dict[str, Any]] = [{"device": "cpu"}, {"batch_size": 3}, {"allow_pickle": True}]
    assert {_plan(**changes).fingerprint for changes in same} == {base}
    other: list[dict[str, Any]] = [
        {"seed": 1}, {"eps": "5/255"}, {"norm": "l2", "eps": "4/255"}, {"samples": 9}, {"shard": "1/2"},
        {"precision": "bf16"},
        {"mode": "exhaustive"}, {"judge_draws": 3}, {"query_cap": 5}, {"surrogate": "packaged:photos"},
        {"attack": [{"name": "pgd", "steps": 21}]}, {"attack": [{"name": "pgd", "label": "x"}]},
        {"defense": [{"name": "jpeg"}]}, {"defense": [{"name": "jpeg", "quality": 50}]},
        {"target": [{**TARGET, "head": ["linear"]}]}, {"placement": "center"},
    ]  # fmt: skip
    prints = [_plan(**changes).fingerprint for changes in other]
    assert len({base, *prints}) == len(prints) + 1


def test_another_version_of_a_plugin_is_another_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of an attack's old version must not be continued by its new one."""
    from robustbench_x import plan

    before = _plan().fingerprint
    monkeypatch.setattr(plan, "version", lambda distribution: "99.0")
    assert _plan().fingerprint != before
