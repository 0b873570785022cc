"""A gate policy: which thresholds a run is judged by, read from TOML and checked for sense."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import ConfigDict, Field

from robustbench_x.config import Number
from robustbench_x.errors import near_matches
from robustbench_x.metrics import METRICS
from robustbench_x.pairing import EVENTS
from robustbench_x.result import Level
from robustbench_x.toml import read_toml

__all__ = ["WORST_CASE", "BaselineRule", "GateRule", "Policy", "ReliabilityRule", "load_policy"]

WORST_CASE = "worst_case"
"""As a gate's `attack`: per sample the minimum over attacks, not an attack of its own."""
_WORST_METRICS = ("asr", "robust_accuracy")


class _Frozen(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GateRule(_Frozen):
    """One threshold on one metric, on every cell its patterns select.

    Patterns are shell patterns (`apgd*`). Controls such as noise are left out unless `attack` names them.
    """

    metric: str
    max: Number | None = None
    min: Number | None = None
    attack: str = "*"
    encoder: str = "*"
    head: str = "*"
    data: str = "*"
    defense: str = "*"
    knowledge: str = "*"
    eps: Number | None = None

    @pydantic.field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METRICS:
            raise ValueError(f"unknown metric '{value}'; {_hint(value, METRICS)}")
        return value

    @pydantic.field_validator("max", "min")
    @classmethod
    def _possible(cls, value: float | None, info: pydantic.ValidationInfo) -> float | None:
        metric = info.data.get("metric")
        if value is not None and metric is not None and METRICS[metric].is_rate and not 0 <= value <= 1:
            raise ValueError(f"{metric} is a rate between 0 and 1, not {value:g}; write 0.30 or 30/100 for 30 %")
        return value

    @pydantic.model_validator(mode="after")
    def _one_bound(self) -> "GateRule":
        if (self.max is None) == (self.min is None):
            raise ValueError("a gate has either max or min, and not both")
        if self.attack == WORST_CASE and self.metric not in _WORST_METRICS:
            raise ValueError(f"{WORST_CASE} has {' and '.join(_WORST_METRICS)}, not {self.metric}")
        if self.attack == WORST_CASE and self.knowledge != "*":
            raise ValueError(f"{WORST_CASE} is taken over every knowledge level, so it takes no knowledge pattern")
        return self

    @property
    def threshold(self) -> float:
        """The number that the metric is held against."""
        bound = self.min if self.max is None else self.max
        assert bound is not None, "the validator asks for one of them"
        return bound

    @property
    def bound(self) -> str:
        """The threshold as people read it."""
        return f"{'>=' if self.max is None else '<='} {self.threshold:g}"

    @property
    def title(self) -> str:
        """The rule as people read it."""
        return f"{self.metric} {self.bound}"


class BaselineRule(_Frozen):
    """How much a rate may rise or fall against `--baseline`, on the same samples."""

    max_increase: dict[str, Number] = {}
    max_decrease: dict[str, Number] = {}

    @pydantic.field_validator("max_increase", "max_decrease")
    @classmethod
    def _paired(cls, value: dict[str, float]) -> dict[str, float]:
        for name, limit in value.items():
            if name not in EVENTS:
                raise ValueError(f"'{name}' cannot be compared sample by sample; {_hint(name, EVENTS)}")
            if not 0 <= limit <= 1:
                raise ValueError(
                    f"{name} is a rate between 0 and 1 and cannot move by {limit:g}; write 0.02 for 2 points"
                )
        return value

    @pydantic.model_validator(mode="after")
    def _something(self) -> "BaselineRule":
        if not self.max_increase and not self.max_decrease:
            raise ValueError("a baseline rule needs max_increase or max_decrease, for example { asr = 0.02 }")
        return self


class ReliabilityRule(_Frozen):
    """Levels of findings that make the evaluation unreliable."""

    fail_on: tuple[Level, ...] = ("error",)


class Policy(_Frozen):
    """A gate policy. `inconclusive` says what an interval that straddles its threshold counts as (`point`: ignore
    the interval)."""

    inconclusive: Literal["fail", "pass", "point"] = "fail"
    gate: tuple[GateRule, ...] = ()
    baseline: BaselineRule | None = None
    reliability: Annotated[ReliabilityRule, Field(default_factory=ReliabilityRule)]

    @pydantic.model_validator(mode="after")
    def _something_to_judge(self) -> "Policy":
        if not self.gate and self.baseline is None:
            raise ValueError("the policy holds no gate; add [[gate]] or [baseline]")
        return self


def load_policy(path: Path) -> Policy:
    """The policy in a TOML file.

    Raises:
        ConfigError: Malformed, unknown metric, contradiction; names file, line and key.
    """
    return read_toml(path, Policy)


def _hint(name: str, known: Mapping[str, object]) -> str:
    near = near_matches(name, known)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
