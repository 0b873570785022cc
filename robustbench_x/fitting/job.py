"""The training of an attack as the harness sets it up: what is handed over, what identifies it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import nn

from robustbench_x.encoders.encoder import Encoder
from robustbench_x.encoders.loading import file_sha256
from robustbench_x.fitting.artifact import Artifact
from robustbench_x.fitting.ground import Ground, code_digest, device_name
from robustbench_x.fitting.loop import Show
from robustbench_x.integrity import modules_within
from robustbench_x.plugin import AttackSpec, FittedAttack
from robustbench_x.victim import Shield, perceive
from robustbench_x.views import EncoderHandle, FitView, Knowledge, Meter

__all__ = ["FitJob", "decisive_params", "device_name"]

_PLACES = ("artifact", "fit_encoder")
"""Parameters that say where an artefact comes from, not what it is."""


def decisive_params(spec: AttackSpec, attack: object) -> dict[str, Any]:
    """An attack's parameters, but for those that say where an artefact comes from."""
    return {p.name: getattr(attack, p.name) for p in spec.params if not spec.fits or p.name not in _PLACES}


@final
@dataclass(frozen=True, kw_only=True)
class FitJob:
    """Everything the training of an attack depends on.

    `shield` and `knowledge` are the defence as the attacker has it: what it is fitted through.
    """

    spec: AttackSpec
    attack: FittedAttack[Any]
    ground: Ground
    shield: Shield | None = None
    shield_title: str = "none"
    shield_params: Mapping[str, Any] | None = None
    knowledge: Knowledge = "none"

    @property
    def name(self) -> str:
        """The attack's."""
        return self.spec.name

    @property
    def untouchable(self) -> tuple[nn.Module, ...]:
        """The encoders, and what the defence holds."""
        return (*self.ground.encoders, *(() if self.shield is None else modules_within(self.shield.defense)))

    @property
    def params(self) -> dict[str, Any]:
        """The attack's parameters as far as they decide what is learned."""
        params = decisive_params(self.spec, self.attack)
        fitted_by = self.spec.fitted_by
        return params if fitted_by is None else {name: params[name] for name in fitted_by}

    def key(self) -> str:
        """See `Ground.key`; with the defence it is fitted through."""
        shield = self.shield
        behind = (
            [] if shield is None else [shield.spec.name, code_digest(type(shield.defense).__module__), shield.learned]
        )
        # A missing file is the attack's to name.
        files = [file_sha256(path) for path in self.spec.reads(self.attack) if path.is_file()]
        more = [files] if files else []
        return self.ground.key(self.spec, self.params, behind, dict(self.shield_params or {}), self.knowledge, *more)

    def cache_key(self) -> str:
        """See `Ground.cache_key`."""
        return self.ground.cache_key(self.key())

    def run(self, checkpoint: Path | None, show: Show | None = None, *, every: float = 20.0) -> Artifact:
        """Trains, from the checkpoint where there is one.

        Raises:
            SampleError: The training broke down.
        """
        meter, key = Meter(), self.key()
        view = self.view(meter)
        trained = self.ground.train(
            lambda: self.attack.trainer(view), self.name, meter, key=key, checkpoint=checkpoint, show=show, every=every
        )
        provenance = self.ground.provenance(
            self.spec, self.params, key, trained, defense=self.shield_title, knowledge=self.knowledge
        )
        return Artifact(trained.tensors, provenance)

    def view(self, meter: Meter) -> FitView:
        """What the plugin is handed."""
        ground = self.ground
        through = perceive(self.shield, self.knowledge)
        sees = self.shield is not None and self.knowledge not in ("none", "oblivious")
        stochastic = sees and self.shield is not None and self.shield.spec.stochastic

        def handle(encoder: Encoder) -> EncoderHandle:
            return EncoderHandle(encoder, through, meter, bf16=ground.bf16, stochastic=stochastic)

        return FitView(
            encoder=handle(ground.encoder),
            surrogate=ground.surrogate(),
            threat=ground.threat,
            seed=ground.plugin_seed(self.name),
            device=ground.device,
            partners=tuple(handle(encoder) for encoder in ground.partners),
            world=ground.world,
            bf16=ground.bf16,
        )
