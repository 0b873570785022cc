"""What the bridge must know about one torchattacks class: its budget, its parameters, its quirks."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from robustbench_x.plugin import param
from robustbench_x.threat import Norm
from robustbench_x.views import Access

__all__ = ["Entry", "Knob", "Target"]

Target = Literal["none", "next", "least_likely"]


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One parameter of an attack, and the torchattacks constructor argument it sets.

    Args:
        name: Our name for it.
        default: Its value; the type is taken from it.
        help: As `rbx describe` shows it.
        argument: Theirs; empty where the bridge itself uses the value.
        low: Smallest value accepted.
        high: Largest value accepted.
        kind: The annotation where it is not the type of the default.
    """

    name: str
    default: Any
    help: str
    argument: str = ""
    low: float = 0
    high: float = math.inf
    kind: Any = None

    @property
    def annotation(self) -> Any:
        """The type a parameter must have."""
        return type(self.default) if self.kind is None else self.kind

    def field(self) -> Any:
        """The dataclass field that carries it."""
        return param(self.default, self.help)

    def check(self, value: object) -> None:
        """Refuses a number out of bounds.

        Raises:
            ValueError: Names the bounds.
        """
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        if not self.low <= value <= self.high:
            bound = f"at least {self.low:g}" if math.isinf(self.high) else f"in [{self.low:g}, {self.high:g}]"
            raise ValueError(f"{self.name}={value:g} must be {bound}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One torchattacks class.

    Args:
        name: Its class name.
        summary: One line for the catalogue.
        source: Paper.
        access: `scores` where it reads logits without gradients, `none` where it reads no model.
        norms: Threat models its result is meant for.
        eps: The constructor argument that takes the budget; empty for a search of the smallest change.
        budget: Whether it stays inside the budget by itself and spends it.
        knobs: Its parameters.
        fixed: Constructor arguments that are no parameter here.
        step_factor: Where `step_size` is not given it is this times eps / steps.
        dual: Takes the norm by an argument, as `Linf` or `L2`.
        seeded: Takes a seed by an argument (and seeds torch globally with it).
        counts_classes: Takes the number of classes by an argument; it attacks one target class less.
        targets: How a target class reaches it: `label` in place of the labels, `function` beside them, or not at
            all.
        goal: `targeted` for an attack that knows no other mode.
        clamps: Asks about images outside [0, 1].
        lifts: Masks logits with 0, which is wrong where they are negative.
        insets: Cannot move a pixel that is exactly 0 or 1.
        each: Runs one image at a time, on its likeliest classes only.
        square: Why it needs square images; empty where it does not.
        min_classes: Fewest classes it can run with.
        instead: What to use with fewer classes.
        max_values: Most pixel values (C * H * W) it can hold in memory.
    """

    name: str
    summary: str
    source: str
    access: Access = "whitebox"
    norms: tuple[Norm, ...] = ("linf",)
    eps: str = "eps"
    budget: bool = True
    knobs: tuple[Knob, ...] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)
    step_factor: float = 2.5
    dual: bool = False
    seeded: bool = False
    counts_classes: bool = False
    targets: Literal["", "label", "function"] = ""
    goal: Literal["untargeted", "targeted"] = "untargeted"
    clamps: bool = False
    lifts: bool = False
    insets: bool = False
    each: bool = False
    square: str = ""
    min_classes: int = 2
    instead: str = ""
    max_values: int | None = None

    @property
    def all_knobs(self) -> tuple[Knob, ...]:
        """The knobs, and `target` where a target class can be given."""
        if not self.targets:
            return self.knobs
        if self.goal == "targeted":
            kind: Any = Literal["next", "least_likely"]
            return (*self.knobs, Knob(name="target", default="next", help="class aimed at", kind=kind))
        text = "class aimed at: none (away from the label), next (label + 1) or least_likely"
        return (*self.knobs, Knob(name="target", default="none", help=text, kind=Target))

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments that do not depend on the view; None where a step size is yet to be computed."""
        chosen = {knob.argument: values[knob.name] for knob in self.knobs if knob.argument}
        return {**self.fixed, **chosen}

    def replace(self, **changes: Any) -> "Entry":
        """This entry with `changes`."""
        return dataclasses.replace(self, **changes)
