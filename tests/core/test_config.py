"""What an audit may be asked to do, from a file, from flags and from both."""

import contextlib
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_x.config import AuditConfig, default_config, load_config, override, parse_params
from robustbench_x.errors import ConfigError
from robustbench_x.plan import make_plan
from robustbench_x.registry import load_registry
from robustbench_x.toml import dump_toml, parse_toml

BASE: dict[str, Any] = {
    "target": [{"encoder": "timm:a", "head": ["linear", "knn"], "data": "folder:x"}],
    "attack": [
        {"name": "pgd", "steps": 5, "step_size": "2/255"},
        {"name": "pgd", "label": "pgd long", "steps": 50},
        {"name": "torchattacks:PGD"},
    ],
    "defense": [{"name": "jpeg", "quality": 50, "knowledge": ["bpda"]}],
    "eps": ["4/255", 0.1],
}


def config(**changes: Any) -> AuditConfig:
    return AuditConfig.model_validate({**BASE, **changes})


def test_the_embedded_default_loads_and_plans() -> None:
    default = default_config()
    cells = make_plan(default, load_registry()).cells
    assert {cell.attack for cell in cells} == {"noise", "advencoder", "embed", "pgd", "apgd_ce"}
    assert all(t.encoder[0].startswith("packaged:") for t in default.target)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda t: t not in ("none", "noise", "worst_case")
)
KEYS = st.sampled_from(["steps", "a b", "loss", "x.y"])
PARAMS = st.dictionaries(
    KEYS,
    st.one_of(
        st.integers(-5, 10**6), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), NAMES,
        st.lists(st.integers(0, 9), max_size=3), st.just("8/255"),
    ),
    max_size=3,
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> AuditConfig:
    titles = draw(st.lists(NAMES, min_size=2, max_size=4, unique=True))
    return AuditConfig.model_validate(
        {
            "target": [{"encoder": draw(NAMES), "head": draw(st.lists(NAMES, min_size=1)), "data": draw(NAMES)}],
            "attack": [{**draw(PARAMS), "name": "pgd", "label": title} for title in titles],
            "defense": [{**draw(PARAMS), "name": titles[0], "knowledge": draw(st.sampled_from([None, ["full"]]))}],
            "eps": draw(
                st.lists(st.one_of(st.integers(0, 255).map(lambda k: k / 255), st.floats(0, 1)), min_size=1, max_size=3)
                .map(lambda values: list({f"{v:.5g}": v for v in values}.values()))
            ),
            "samples": draw(st.none() | st.integers(1, 99)),
            "batch_size": draw(st.sampled_from(["auto", 7])),
            "shard": draw(st.sampled_from([None, "2/3"])),
            "seed": draw(st.integers(-3, 9)),
            "surrogate": draw(st.none() | NAMES),
        }
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(configs())
def test_a_configuration_survives_toml_exactly(made: AuditConfig) -> None:
    again = parse_toml(made.to_toml(), AuditConfig, name="again")
    assert again == made
    assert again.to_toml() == made.to_toml()
    assert AuditConfig.model_validate(made.replay()) == made


def test_fractions_of_255_are_written_as_such() -> None:
    assert tomllib.loads(config().to_toml())["eps"] == ["4/255", 0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": "8"}, r"eps=8 exceeds 1: pixels live in \[0, 1\], so write 8/255, not 8"),
        ({"eps": True}, "must be a number, not true"),
        ({"eps": ["nan"]}, "'nan' is not a finite number"),
        ({"eps": -0.1}, "eps must be a finite number >= 0"),
        ({"eps": ["4/255", 4 / 255]}, "a budget is listed twice"),
        ({"samples": 0}, "greater than 0"),
        ({"samples": True}, "must be a number, not true"),
        ({"shard": "5/4"}, "'5/4' is not a shard; write 1/4"),
        ({"shard": "0/4"}, "is not a shard"),
        ({"norm": "linff"}, "should be 'linf', 'l2' or 'patch'"),
        ({"attack": [{"name": "pgd"}, {"name": "pgd"}]}, "'pgd' is listed twice; give each its own label"),
        ({"attack": [{"name": "pgd", "label": "noise"}]}, "label 'noise' means something else in a report"),
        ({"attack": [{"name": "pgd", "label": "worst_case"}]}, "label 'worst_case' means something else"),
        ({"attack": [{"name": "noise", "label": "n"}]}, "noise is looked up by its name, so it takes no label"),
        ({"defense": [{"name": "jpeg", "label": "none"}]}, "label 'none' means something else"),
        ({"attack": []}, "at least 1 item"),
        ({"batch_size": "big"}, "should be 'auto'"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_toml(dump_toml({**BASE, **changes}), AuditConfig, name="audit.toml")
    flags = {k: v for k, v in changes.items() if k not in ("attack", "defense")}
    if flags:
        flag = "--" + next(iter(flags)).replace("_", "-")
        with pytest.raises(ConfigError, match=f"^{flag}: .*{message}"):
            override(config(), from_file=True, settings=flags)


def test_on_a_file_flags_replace_what_they_name_and_keep_the_rest() -> None:
    base = config()
    made = override(
        base, from_file=True, encoder=["timm:b", "timm:c"], attack=["pgd long", "apgd_ce"], settings={"seed": 4}
    )
    assert made.target[0].encoder == ("timm:b", "timm:c")
    assert made.target[0].head == ("linear", "knn")
    assert [(a.title, a.params) for a in made.attack] == [("pgd long", {"steps": 50}), ("apgd_ce", {})]
    assert made.defense == base.defense
    assert (made.seed, made.eps) == (4, base.eps)
    assert override(base, from_file=True) == base


def test_targets_that_become_equal_are_one() -> None:
    base = config(target=[{"encoder": e, "head": "linear", "data": "folder:x"} for e in ("timm:a", "timm:b")])
    assert len(override(base, from_file=True, encoder=["timm:c"]).target) == 1


def test_on_the_default_naming_a_target_starts_a_new_audit_at_full_settings() -> None:
    base = default_config()
    made = override(base, from_file=False, encoder=["timm:a"])
    assert [t.model_dump() for t in made.target] == [
        {"encoder": ("timm:a",), "head": ("linear",), "data": ("packaged:digits",), "samples": None}
    ]
    assert made.defense == ()
    assert all(not attack.params for attack in made.attack)
    assert [a.name for a in made.attack] == [a.name for a in base.attack if a.name != "advencoder"]
    assert override(base, from_file=False, head=["native"]).target[0].data == ("packaged:photos",)
    only_attack = override(base, from_file=False, attack=["pgd"])
    assert only_attack.target == base.target
    assert only_attack.attack[0].params == {}


def test_what_ships_for_the_default_s_encoders_and_norm_stays_with_them() -> None:
    assert [a.params for a in default_config().attack if a.name == "advencoder"] == [{"artifact": "shipped"}]
    other_norm = override(default_config(), from_file=False, settings={"norm": "l2", "eps": ["1.0"]})
    other_eps = override(default_config(), from_file=False, settings={"eps": ["8/255"]})
    assert "advencoder" not in [a.name for a in other_norm.attack]
    assert "advencoder" in [a.name for a in other_eps.attack]


def test_the_defence_none_is_no_defence() -> None:
    assert override(default_config(), from_file=False, defense=["none"]).defense == ()
    both = override(config(), from_file=True, defense=["none", "jpeg"])
    assert both.defense == config().defense


def test_params_reach_the_attack_or_defence_they_name() -> None:
    made = override(
        config(),
        from_file=True,
        params=["pgd.steps=7", "pgd long.loss=dlr", "torchattacks:PGD.steps=3", "jpeg.quality=9"],
    )
    assert [a.params for a in made.attack] == [
        {"steps": 7, "step_size": "2/255"}, {"steps": 50, "loss": "dlr"}, {"steps": 3},
    ]  # fmt: skip
    assert made.defense[0].params == {"quality": 9}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pgd.steps=7", {"pgd": {"steps": 7}}),
        ("pgd.step_size=2/255", {"pgd": {"step_size": "2/255"}}),
        ("pgd.random_start=false", {"pgd": {"random_start": False}}),
        ("pgd.loss='dlr'", {"pgd": {"loss": "dlr"}}),
        ("pgd.loss=dlr", {"pgd": {"loss": "dlr"}}),
        ("pgd.x=a=b", {"pgd": {"x": "a=b"}}),
        ("pgd.x=[1, 2]", {"pgd": {"x": [1, 2]}}),
        ("pgd.x=1\ny=2", {"pgd": {"x": "1\ny=2"}}),
        ("torchattacks:PGD.steps=5", {"torchattacks:PGD": {"steps": 5}}),
        ("a.b.c=1", {"a.b": {"c": 1}}),
    ],
)
def test_assignments_are_read(text: str, expected: dict[str, Any]) -> None:
    assert parse_params([text], ["pgd", "torchattacks:PGD", "a", "a.b"]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pgd", "write attack.param=value, for example pgd.steps=50"),
        ("pgd.steps", "write attack.param=value"),
        ("steps=3", "write attack.param=value"),
        ("pg.steps=3", "this audit runs no 'pg'; it runs pgd"),
        ("pgd.name=noise", "pgd has no parameter 'name'"),
        ("pgd.label=x", "pgd has no parameter 'label'"),
        ("pgd.=x", "pgd has no parameter ''"),
    ],
)
def test_assignments_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(config(), from_file=True, params=[text])


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from(["eps", "samples", "shard", "seed", "norm", "batch_size", "mode", "device", "precision"]),
    value=st.one_of(st.text(max_size=5), st.integers(), st.floats(), st.booleans(), st.lists(st.text(max_size=3))),
    param=st.text(max_size=12),
)
def test_nothing_but_a_library_error_leaves_override(key: str, value: Any, param: str) -> None:
    with contextlib.suppress(ConfigError):
        override(config(), from_file=True, settings={key: value}, params=[f"pgd.{param}"])


@pytest.mark.parametrize("preset", ["audit.toml", "default.toml"])
def test_shipped_audits_plan_with_the_installed_plugins(preset: str, tmp_path: Path) -> None:
    file = tmp_path / preset
    file.write_text((files("robustbench_x") / "presets" / preset).read_text(encoding="utf-8"), encoding="utf-8")
    assert make_plan(load_config(file), load_registry()).cells


def test_a_budget_belongs_to_its_norm() -> None:
    """4/255 is a linf budget; as a Euclidean length it would change next to nothing, and everything would hold."""
    target = {"target": [{"encoder": "a:b", "data": "c:d"}], "attack": [{"name": "pgd"}]}
    with pytest.raises(pydantic.ValidationError, match="norm l2 has no default budget; give eps, for example"):
        AuditConfig.model_validate({**target, "norm": "l2"})
    assert AuditConfig.model_validate({**target, "norm": "l2", "eps": 1.0}).eps == (1.0,)
    with pytest.raises(ConfigError, match="--norm l2: the budget at hand was given for linf; give --eps too"):
        override(default_config(), from_file=False, settings={"norm": "l2"})
    assert override(default_config(), from_file=False, settings={"norm": "patch", "eps": ["0.03"]}).norm == "patch"
