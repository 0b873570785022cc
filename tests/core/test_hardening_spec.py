"""Hardening specs: what is refused at registration, and how an inner attack is named."""

from dataclasses import dataclass
from typing import Any

import pytest

from robustbench_x.errors import ConfigError, PluginError
from robustbench_x.hardening import HardeningSpec, HardenView, InnerName, split_inner
from robustbench_x.plugin import Trainer, param
from robustbench_x.registry import Registry, load_registry

REAL = load_registry()


@dataclass(frozen=True, kw_only=True)
class Toy:
    inner: str = param("embed", "attack")

    def trainer(self, view: HardenView) -> Trainer:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NoInner:
    steps: int = param(1, "steps")

    def trainer(self, view: HardenView) -> Trainer:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NoTrainer:
    inner: str = param("embed", "attack")


def spec(**changes: Any) -> HardeningSpec:
    known: dict[str, Any] = {"name": "toy", "summary": "s", "factory": Toy, "source": "s"}
    return HardeningSpec(**{**known, **changes})


def test_a_sound_spec_is_registered_once() -> None:
    registry = Registry()
    registry.load(lambda r: r.add_hardening(spec()), origin="first")
    assert registry.hardenings.origin("toy") == "first"
    with pytest.raises(PluginError, match="hardening 'toy' from second is already registered by first"):
        registry.load(lambda r: r.add_hardening(spec()), origin="second")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "two words"}, "hardening 'two words': a name is one word"),
        ({"name": "none"}, "has a meaning of its own"),
        ({"summary": ""}, "summary and source must say something"),
        ({"factory": int}, "its factory must be a dataclass"),
        ({"factory": NoTrainer}, r"has no method trainer\(\)"),
        ({"factory": NoInner}, "no parameter 'inner' that names its attack"),
    ],
)
def test_a_malformed_spec_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        Registry().add_hardening(spec(**changes))


def test_no_attack_and_hardening_share_a_name() -> None:
    registry = Registry()
    registry.add_attack(REAL.attacks["pgd"])
    with pytest.raises(PluginError, match="hardening 'pgd': an attack has this name already"):
        registry.add_hardening(spec(name="pgd"))
    registry.add_hardening(spec(name="embed"))
    with pytest.raises(PluginError, match="attack 'embed': a hardening has this name already"):
        registry.add_attack(REAL.attacks["embed"])


def test_things_that_are_no_hardening_are_refused() -> None:
    wrong: HardeningSpec = REAL.defenses["jpeg"]  # type: ignore[assignment]
    with pytest.raises(PluginError, match="add_hardening takes a HardeningSpec, got DefenseSpec"):
        Registry().add_hardening(wrong)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("embed", InnerName("embed", {})),
        ("embed?steps=3&loss=l2", InnerName("embed", {"steps": 3, "loss": "l2"})),
        ("torchattacks:PGD?eps=8/255", InnerName("torchattacks:PGD", {"eps": "8/255"})),
        ('xtransfer?partners=["a?size=9"]', InnerName("xtransfer", {"partners": ["a?size=9"]})),
        (
            "dta?layers=a,b&artifact=maps/m.safetensors",
            InnerName("dta", {"layers": "a,b", "artifact": "maps/m.safetensors"}),
        ),
    ],
)
def test_an_inner_attack_is_named_with_its_parameters(asked: str, found: InnerName) -> None:
    assert split_inner(asked) == found


@pytest.mark.parametrize("asked", ["", "?steps=3", "embed?steps", "embed?=3", "embed?steps=3&"])
def test_what_names_no_attack_is_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match=r"write an attack and its parameters as embed\?loss=l2&steps=10"):
        split_inner(asked)
