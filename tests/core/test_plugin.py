"""Specs: what is refused at registration, and how parameters are checked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from torch import Tensor

from robustbench_x.errors import ConfigError, MissingExtraError, PluginError
from robustbench_x.plugin import AttackSpec, DefenseSpec, check_spec, param
from robustbench_x.views import View


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Attack and defence at once."""

    steps: int = param(3, "steps")
    size: float = param(0.5, "size")
    least: float | None = param(None, "least")
    loss: Literal["ce", "dlr"] = param("ce", "loss")
    start: bool = param(True, "start")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")

    def run(self, view: View) -> Tensor:
        return view.inputs

    def apply(self, images: Tensor) -> Tensor:
        return images


@dataclass(frozen=True, kw_only=True)
class NoDefault:
    steps: int

    def run(self, view: View) -> Tensor:
        return view.inputs


@dataclass(frozen=True, kw_only=True)
class Shadows:
    label: str = param("", "clashes with a key of audit.toml")

    def run(self, view: View) -> Tensor:
        return view.inputs


class Plain:
    def run(self, view: View) -> Tensor:
        return view.inputs


@dataclass(frozen=True, kw_only=True)
class Empty:
    pass


def attack(**changes: Any) -> AttackSpec:
    known: dict[str, Any] = {"name": "toy", "summary": "s", "factory": Toy, "source": "s", "access": "whitebox"}
    return AttackSpec(**{**known, **changes})


def defense(**changes: Any) -> DefenseSpec:
    known: dict[str, Any] = {"name": "toy", "summary": "s", "factory": Toy, "source": "s"}
    return DefenseSpec(**{**known, **changes})


def test_a_sound_spec_is_accepted() -> None:
    check_spec(attack())
    check_spec(defense())
    assert [p.name for p in attack().params] == ["steps", "size", "least", "loss", "start"]


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (attack, {"name": ""}, "attack '': a name is one word without spaces"),
        (attack, {"name": "two words"}, "a name is one word without spaces"),
        (attack, {"name": "worst_case"}, "has a meaning of its own in reports"),
        (defense, {"name": "none"}, "defence 'none': this name has a meaning of its own"),
        (attack, {"summary": ""}, "summary and source must say something"),
        (defense, {"source": ""}, "summary and source must say something"),
        (attack, {"factory": Plain}, "its factory must be a dataclass"),
        (attack, {"factory": Toy()}, "its factory must be a dataclass"),
        (attack, {"factory": Empty}, r"has no method run\(\)"),
        (defense, {"factory": Empty}, r"has no method apply\(\)"),
        (defense, {"gradient": "stand-in"}, r"has no method stand_in\(\)"),
        (defense, {"gradient": "fake"}, "gradient is 'fake'; choose from exact, stand-in"),
        (attack, {"access": "everything"}, "access is 'everything'; choose from none, encoder"),
        (attack, {"norms": ("linf", "l7")}, "norms is 'l7'; choose from linf, l2, patch"),
        (attack, {"norms": ()}, "norms is nothing"),
        (attack, {"norms": "linf"}, "norms is 'linf'"),
        (attack, {"goal": "world"}, "goal is 'world'"),
        (defense, {"knowledge": ("none",)}, "knowledge is 'none'; choose from oblivious, bpda, bpda_learned, full"),
        (attack, {"factory": NoDefault}, "parameter 'steps' has no default"),
        (attack, {"factory": Shadows}, "'label' is a key of audit.toml"),
    ],
)
def test_a_malformed_spec_is_refused(make: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        check_spec(make(**changes))


@pytest.mark.parametrize(
    ("given", "built"),
    [
        ({}, {}),
        ({"steps": 7}, {"steps": 7}),
        ({"steps": "7"}, {"steps": 7}),
        ({"size": "2/255"}, {"size": 2 / 255}),
        ({"size": 1}, {"size": 1.0}),
        ({"least": "1/4"}, {"least": 0.25}),
        ({"least": None}, {"least": None}),
        ({"loss": "dlr", "start": False}, {"loss": "dlr", "start": False}),
    ],
)
def test_parameters_are_read_as_their_types(given: dict[str, Any], built: dict[str, Any]) -> None:
    effective = attack().effective(given)
    assert {k: effective[k] for k in built} == built
    assert all(type(effective[k]) is type(v) for k, v in built.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 3}, r"^toy has no parameter 'stepz'; did you mean steps\?$"),
        ({"zzzz": 3}, r"^toy has no parameter 'zzzz'; known: steps, size, least, loss, start$"),
        ({"steps": "three"}, r"^toy\.steps='three': .*\(expected int\)$"),
        ({"steps": 2.5}, r"^toy\.steps=2\.5: .*\(expected int\)$"),
        ({"steps": True}, r"^toy\.steps=true: expected int$"),
        ({"size": "wide"}, r"^toy\.size: 'wide' is not a number; write 0\.03"),
        ({"size": "nan"}, r"^toy\.size: 'nan' is not a finite number$"),
        ({"loss": "hinge"}, r"^toy\.loss='hinge': input should be 'ce' or 'dlr'"),
        ({"steps": 0}, r"^toy: steps=0 must be at least 1$"),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attack().build(given)


def test_a_plugin_without_its_package_prints_the_command() -> None:
    spec = attack(extra=("torchattacks", "torchattacks"), missing=lambda: True)
    with pytest.raises(
        MissingExtraError, match=r"toy needs the package torchattacks: pip install 'robustbench-x\[torch"
    ):
        spec.build()
    assert attack(extra=("torchattacks", "torchattacks"), missing=lambda: False).build() == Toy()
