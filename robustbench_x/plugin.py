"""What a plugin registers: attacks and defences, each described by a spec that tests and reports read."""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import pydantic
from torch import Tensor

from robustbench_x.errors import ConfigError, MissingExtraError, PluginError, near_matches
from robustbench_x.numbers import parse_number
from robustbench_x.threat import Norm
from robustbench_x.views import Access, DefenseFitView, EncoderHandle, FitView, Knowledge, View

__all__ = [
    "Attack",
    "AttackSpec",
    "Defense",
    "DefenseSpec",
    "Detector",
    "Fitted",
    "FittedAttack",
    "FittedDefense",
    "Param",
    "Spec",
    "StandInDefense",
    "Trainer",
    "check_common",
    "check_spec",
    "param",
]

ViewT = TypeVar("ViewT", bound=View, contravariant=True)


class Attack(Protocol[ViewT]):
    """Turns a view into candidate images; the harness judges them.

    An attack is a frozen dataclass whose fields are its parameters. It never writes to what it is handed.
    """

    def run(self, view: ViewT) -> Tensor:
        """Candidate images, same shape, dtype and device as `view.inputs`."""


class Trainer(Protocol):
    """A training in progress. The harness draws the batches, calls `step`, counts, stores, resumes.

    Every draw of `step` must follow from the seed of the view and the number of the step alone, and everything
    else from `state`: then a run that was killed and resumed ends with the same tensors as one that was not.
    """

    @property
    def steps(self) -> int:
        """Optimisation steps in all."""

    @property
    def batch(self) -> int:
        """Surrogate images per step; 0 for a method that looks at none."""

    def step(self, number: int, index: Tensor) -> Mapping[str, Tensor]:
        """One optimisation step on the surrogate images `index` `(batch,)`; returns its loss terms, 0-d each."""

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to what `state` returned."""

    def result(self) -> dict[str, Tensor]:
        """What the attack needs to run: the artefact's tensors."""


class FittedAttack(Attack[ViewT], Protocol[ViewT]):
    """An attack that is trained first, once per encoder; its `run` finds the result in `view.artifact`."""

    artifact: str
    fit_encoder: str

    def trainer(self, view: FitView) -> Trainer:
        """A training from its start."""


class Defense(Protocol):
    """Maps images `(N, 3, H, W)` in [0, 1] to images in [0, 1]: what is deployed in front of the encoder.

    A random defence draws from torch's global generator, which the harness seeds and restores.
    """

    def apply(self, images: Tensor) -> Tensor:
        """The images the encoder gets to see, `(N, 3, H, W)`, or V looks at each, `(N, V, 3, H, W)`, whose features
        the harness averages."""


class StandInDefense(Defense, Protocol):
    """A defence with no useful gradient of its own, and a differentiable stand-in for it."""

    def stand_in(self, images: Tensor) -> Tensor:
        """A differentiable approximation of `apply`, used only for its gradient."""


class Detector(Defense, Protocol):
    """A defence that may refuse an image: the harness sets the threshold, on clean images, and applies it."""

    def score(self, images: Tensor, encoder: EncoderHandle) -> Tensor:
        """How suspicious each image `(N, 3, H, W)` is, `(N,)`, with gradients; higher is more so."""


class FittedDefense(Protocol):
    """A defence that is trained first, on clean images; its `artifact` names a file, or `shipped`, or is empty."""

    artifact: str

    def trainer(self, view: DefenseFitView) -> Trainer:
        """A training from its start."""

    def armed(self, learned: Mapping[str, Tensor]) -> Defense:
        """The defence to deploy, from the tensors that a training left, on their device.

        Raises:
            ValueError: They are not what it needs.
        """


@dataclass(frozen=True, kw_only=True)
class Param:
    """One parameter of a plugin, as `rbx describe` shows it."""

    name: str
    type: str
    default: Any
    help: str


def param(default: Any, help: str) -> Any:  # noqa: A002 - argparse, click and typer call it help
    """A dataclass field with a default and a line of help, for attack and defence parameters."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The parameters of every attack that is trained first; the harness reads them, the attack need not."""

    artifact: str = param("", "file written by rbx fit, or 'shipped'; empty: fit on demand, cached")
    fit_encoder: str = param("", "encoder source it is fitted on (transfer); empty: the victim's own")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What every kind of plugin has in common: a name, a factory whose fields are the parameters, a source.

    `extra` is (package, extra) where the plugin needs an optional dependency, and `missing` says whether it
    is absent here.
    """

    name: str
    summary: str
    factory: Callable[..., Any]
    source: str
    extra: tuple[str, str] | None = None
    missing: Callable[[], bool] = lambda: False

    @property
    def params(self) -> tuple[Param, ...]:
        """The parameters, in the order the factory declares them."""
        fields = dataclasses.fields(self.factory) if dataclasses.is_dataclass(self.factory) else ()
        return tuple(
            Param(name=f.name, type=_type_name(f.type), default=f.default, help=f.metadata.get("help", ""))
            for f in fields
            if f.init
        )

    def build(self, params: Mapping[str, Any] | None = None) -> Any:
        """The plugin with `params` set and everything else at its default.

        Raises:
            MissingExtraError: It needs a package that is not installed.
            ConfigError: A parameter is unknown or of the wrong type or value.
        """
        if self.extra and self.missing():
            raise MissingExtraError(self.name, package=self.extra[0], extra=self.extra[1])
        params = dict(params or {})
        known = [p.name for p in self.params]
        for key in params:
            if key not in known:
                near = near_matches(key, known)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
                raise ConfigError(f"{self.name} has no parameter '{key}'; {hint}")
        hints = typing.get_type_hints(self.factory)
        checked = {k: _coerce(f"{self.name}.{k}", v, hints[k]) for k, v in params.items()}
        try:
            return self.factory(**checked)
        except ValueError as error:
            raise ConfigError(f"{self.name}: {error}") from error

    def effective(self, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Every parameter's value with `params` applied, as a report stores it."""
        built = self.build(params)
        return {p.name: getattr(built, p.name) for p in self.params}


def _no_partners(attack: Any) -> tuple[str, ...]:
    return ()


def _no_files(attack: Any) -> tuple[Path, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class AttackSpec(Spec):
    """An attack as the registry knows it.

    Args:
        name: As in its paper, lower-case.
        summary: One line for the catalogue.
        factory: A frozen dataclass with a `run(view)` method.
        source: Paper or origin.
        access: What it needs to see; decides which view it gets.
        norms: Threat models it supports.
        goal: `targeted` attacks aim at a class they choose; both are judged by whether the prediction is wrong.
        budget: Spends a fixed budget (True) or searches the smallest change and is projected (False).
        deterministic: Makes the same images from the same view and seed, bit for bit, on one machine.
        control: A control (noise), not meant to succeed.
        fits: Is trained first: the factory derives from `Fitted` and has a `trainer(view)`.
        fitted_by: Names of the parameters that decide what is learned; None: every one. An artefact serves all settings
            of the others.
        shipped: A folder of artefacts that come with the plugin, found by the encoder's digest.
        partners: Sources of the further public encoders that a built attack is fitted on, or runs on.
        joint: Evades a detector when it is handed one (`WhiteboxView.detector`); others can only be oblivious of it.
        aims: Is handed a target image per sample, chosen by the harness (`EncoderView.targets`), and is judged by
            `targeted_success` too; goes with access `encoder` and goal `targeted`.
        reads: Files of a built attack whose content decides what is learned.
        ready: Whether a built attack that fits learns nothing here, so that nobody could have trained it through a
            defence.
        scales: Its training shares the batch among the processes of `FitView.world`; others train in one.
    """

    access: Access
    norms: tuple[Norm, ...] = ("linf",)
    goal: Literal["untargeted", "targeted"] = "untargeted"
    budget: bool = True
    deterministic: bool = True
    control: bool = False
    fits: bool = False
    fitted_by: tuple[str, ...] | None = None
    shipped: Path | None = None
    partners: Callable[[Any], tuple[str, ...]] = _no_partners
    joint: bool = False
    aims: bool = False
    reads: Callable[[Any], tuple[Path, ...]] = _no_files
    ready: Callable[[Any], bool] = lambda attack: bool(attack.artifact)
    scales: bool = False

    @property
    def partners_run(self) -> bool:
        """Whether it runs on other encoders alone, and so never sees the victim; one that aims has the victim's too."""
        return not self.fits and not self.aims and self.partners is not _no_partners


@dataclass(frozen=True, kw_only=True)
class DefenseSpec(Spec):
    """A defence as the registry knows it.

    Args:
        name: Lower-case.
        summary: One line for the catalogue.
        factory: A frozen dataclass with `apply(images)`, and `stand_in(images)` when `gradient` is `stand-in`.
        source: Paper or origin.
        gradient: `exact` when `apply` is differentiable as it is, `stand-in` when `full` knowledge needs the stand-in.
        stochastic: Draws anew at every call; judged on fresh draws.
        knowledge: Levels an attacker can have of it.
        fits: Is trained first: the factory has `artifact`, `trainer(view)` and `armed(learned)`, and what `armed`
            returns has the methods of a defence.
        per_encoder: Is trained for one encoder, on images of its size; else on patches, for all of them.
        patch: Side of the patches a built defence is trained on.
        reads: Files of a built defence whose content decides what is learned.
        fitted_by: As for `AttackSpec`.
        shipped: A folder of artefacts that come with the plugin.
        detects: Has `score`, and may refuse images; is trained first, if only to have its threshold set.
    """

    gradient: Literal["exact", "stand-in"] = "exact"
    stochastic: bool = False
    knowledge: tuple[Knowledge, ...] = ("oblivious", "bpda", "bpda_learned", "full")
    fits: bool = False
    per_encoder: bool = False
    patch: Callable[[Any], int] = lambda defense: 128
    reads: Callable[[Any], tuple[Path, ...]] = lambda defense: ()
    fitted_by: tuple[str, ...] | None = None
    shipped: Path | None = None
    detects: bool = False


def check_spec(spec: AttackSpec | DefenseSpec) -> None:
    """Refuses a malformed spec at registration, naming what is wrong.

    Raises:
        PluginError: Bad name, unknown level, missing method, or parameters that cannot be introspected.
    """
    if isinstance(spec, AttackSpec):
        where = f"attack '{spec.name}'"
        check_common(where, spec, ("run", "trainer") if spec.fits else ("run",))
        _check_choices(where, "access", (spec.access,), typing.get_args(Access))
        _check_choices(where, "norms", spec.norms, typing.get_args(Norm))
        _check_choices(where, "goal", (spec.goal,), ("untargeted", "targeted"))
        if spec.fits and (spec.access != "encoder" or not issubclass(spec.factory, Fitted)):  # type: ignore[arg-type]
            raise PluginError(f"{where}: an attack that is fitted has access encoder and derives from Fitted")
        if spec.aims and (spec.access, spec.goal) != ("encoder", "targeted"):
            raise PluginError(f"{where}: an attack that aims has access encoder and goal targeted")
        return
    where = f"defence '{spec.name}'"
    if spec.name == "noise":
        raise PluginError(f"{where}: this name has a meaning of its own in reports; choose another")
    methods = ("apply", "stand_in") if spec.gradient == "stand-in" else ("apply",)
    check_common(where, spec, ("trainer", "armed") if spec.fits else methods)
    if spec.fits and "artifact" not in {p.name for p in spec.params}:
        raise PluginError(f"{where}: a defence that is fitted has a parameter 'artifact'")
    if spec.detects and not (spec.fits and spec.per_encoder):
        raise PluginError(f"{where}: a detector is fitted, for one encoder: fits and per_encoder must be set")
    if spec.detects and (spec.stochastic or set(spec.knowledge) != {"oblivious", "full"}):
        raise PluginError(f"{where}: a detector is deterministic and has knowledge oblivious and full")
    _check_choices(where, "knowledge", spec.knowledge, ("oblivious", "bpda", "bpda_learned", "full"))
    _check_choices(where, "gradient", (spec.gradient,), ("exact", "stand-in"))


def check_common(where: str, spec: Spec, methods: Sequence[str]) -> None:
    """Refuses what no kind of plugin may be; `where` opens the message, `methods` are what its factory must have.

    Raises:
        PluginError: Bad name, missing text or method, or parameters that cannot be introspected.
    """
    if not spec.name or spec.name.split() != [spec.name]:
        raise PluginError(f"{where}: a name is one word without spaces")
    if spec.name in ("none", "worst_case"):
        raise PluginError(f"{where}: this name has a meaning of its own in reports; choose another")
    if not spec.summary or not spec.source:
        raise PluginError(f"{where}: summary and source must say something")
    if not isinstance(spec.factory, type) or not dataclasses.is_dataclass(spec.factory):
        raise PluginError(f"{where}: its factory must be a dataclass, so that its parameters can be listed and stored")
    for method in methods:
        if not callable(getattr(spec.factory, method, None)):
            raise PluginError(f"{where}: {spec.factory!r} has no method {method}()")
    for p in spec.params:
        if p.default is dataclasses.MISSING:
            raise PluginError(f"{where}: parameter '{p.name}' has no default")
        if p.name in ("name", "label", "knowledge"):
            raise PluginError(f"{where}: '{p.name}' is a key of audit.toml; give the parameter another name")


def _check_choices(where: str, what: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    wrong = [value for value in values if value not in known] if isinstance(values, tuple) else [values]
    if wrong or not values:
        given = f"'{wrong[0]}'" if wrong else "nothing"
        raise PluginError(f"{where}: {what} is {given}; choose from {', '.join(known)}")


def _coerce(name: str, value: Any, hint: Any) -> Any:
    if isinstance(value, bool) and hint is not bool and bool not in typing.get_args(hint):
        raise ConfigError(f"{name}={str(value).lower()}: expected {_type_name(hint)}")
    try:
        if isinstance(value, str) and (hint is float or float in typing.get_args(hint)):
            value = parse_number(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]["msg"].lower()
        raise ConfigError(f"{name}={value!r}: {problem} (expected {_type_name(hint)})") from None


def _type_name(hint: Any) -> str:
    return hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint)).replace("typing.", "")
