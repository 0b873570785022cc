"""The artefacts of one run: which one made which rows, kept beside them, so that no two are ever mixed."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from robustbench_x.config import AuditConfig
from robustbench_x.encoders.encoder import Encoder
from robustbench_x.engine.stage import StageAtWork
from robustbench_x.engine.supply import Perceived, Supply
from robustbench_x.errors import RunError, SampleError, SourceError
from robustbench_x.fitting.artifact import Artifact, read_artifact, write_artifact
from robustbench_x.fitting.layer_map import read_layers
from robustbench_x.plan import Craft
from robustbench_x.plugin import AttackSpec, FittedAttack
from robustbench_x.provenance import LayerDamage
from robustbench_x.result import FitInfo
from robustbench_x.store import RunFolder

__all__ = ["Artifacts", "artifact_path", "note_of"]


def note_of(craft: Craft) -> str:
    """The name of the note about the artefact of a craft: one for all data sets that the attack meets alike."""
    aware = [] if craft.knowledge in ("none", "oblivious") else [craft.seen, craft.knowledge]
    parts = [craft.attack.model_dump_json(), craft.cells[0].encoder, repr(craft.threat), *aware]
    return f"fit-{hashlib.sha256(chr(31).join(parts).encode()).hexdigest()[:16]}"


def artifact_path(run: Path, info: FitInfo) -> Path:
    """Where a run folder keeps an artefact."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", info.plugin)
    return run / "artifacts" / f"{name}-{info.sha256[:12]}.safetensors"


@final
@dataclass(frozen=True, kw_only=True)
class Artifacts:
    """Takes each artefact from the run folder where rows of it already exist, else from `supply`."""

    folder: RunFolder
    config: AuditConfig
    supply: Supply

    def prepare(self, stage: StageAtWork, craft: Craft, spec: AttackSpec, attack: FittedAttack[Any]) -> None:
        """Loads or opens what the artefact of `craft` will be made from.

        Raises:
            UsageError: Something that was asked for cannot be had or does not belong.
            RunError: The run folder holds rows of another artefact.
        """
        if craft.threat.radius == 0:
            return
        if attack.artifact:
            self.take(stage, craft, spec, attack)
            return
        self.supply.check_surrogate()
        for source in (*spec.partners(attack), *([attack.fit_encoder] if attack.fit_encoder else [])):
            self.supply.load(source)

    def take(self, stage: StageAtWork, craft: Craft, spec: AttackSpec, attack: FittedAttack[Any]) -> Artifact:
        """The artefact of one craft.

        Raises:
            UsageError: What was asked for cannot be had or does not belong.
            RunError: The run folder holds another artefact than its rows were made with, or what decides it changed.
            SampleError: The training failed, or tampered with a model.
        """
        note = note_of(craft)
        stored = self.folder.notes(note)
        if stored is not None:
            used = FitInfo(**stored)
            self.check(stage, craft, spec, attack, used, "interrupted")
            return self._stored(used)
        found = self.supply.artifact(
            spec, attack, stage.encoder, craft.threat, self._perceived(stage, craft), seal=stage.seal
        )
        judged = (digest for number in range(stage.num_batches) for digest in stage.batch(number).digests)
        encoder = self.supply.fitted_on(attack, stage.encoder)
        info = found.artifact.info(found.origin).model_copy(
            update={
                "downstream_images": self._seen_before(stage, attack, judged),
                "layers": self._layers(craft, attack, found.artifact, encoder),
            }
        )
        path = artifact_path(self.folder.path, info)
        if not path.exists():
            write_artifact(path, found.artifact)
        self.folder.note(note, info.model_dump(mode="json"))
        return found.artifact

    def check(
        self,
        stage: StageAtWork,
        craft: Craft,
        spec: AttackSpec,
        attack: FittedAttack[Any],
        used: FitInfo,
        when: str = "finished",
    ) -> None:
        """Whether rows were made with the very artefact that this audit would take or train today.

        Raises:
            RunError: They were not: the file, the surrogate images, an encoder or the code changed.
        """
        if attack.artifact:
            same = self.supply.artifact(spec, attack, stage.encoder, craft.threat).artifact.sha256 == used.sha256
        else:
            encoder = self.supply.fitted_on(attack, stage.encoder)
            job = self.supply.job(spec, attack, encoder, craft.threat, self._perceived(stage, craft))
            same = job.key() == used.key
        if not same:
            what = attack.artifact or "the surrogate images, an encoder or the code"
            raise RunError(
                f"{self.folder.path}: what {craft.attack.title} learned from ({what}) changed since this audit was "
                f"{when}; name another --out, or start over with --no-resume"
            )

    def _layers(
        self, craft: Craft, attack: FittedAttack[Any], artifact: Artifact, encoder: Encoder
    ) -> tuple[LayerDamage, ...]:
        """The artefact's layer map; a broken one is the file's fault, or the plugin's that trained it."""
        try:
            return read_layers(artifact.tensors, (*encoder.layers, *encoder.parts))
        except SourceError as error:
            fault = SourceError if attack.artifact else SampleError
            raise fault(f"what {craft.attack.title} learned cannot be used: {error}") from error

    def _perceived(self, stage: StageAtWork, craft: Craft) -> Perceived:
        if craft.knowledge in ("none", "oblivious"):
            return Perceived()
        shields = {entry.title: entry.params for entry in self.config.defense}
        return Perceived(stage.shields[craft.seen], craft.seen, shields[craft.seen], craft.knowledge)

    def _seen_before(self, stage: StageAtWork, attack: FittedAttack[Any], judged: Iterable[str]) -> int:
        """How many evaluated images were among the surrogate ones; 0 for a file, of which that cannot be known."""
        if attack.artifact:
            return 0
        held = self.supply.image_digests(self.supply.fitted_on(attack, stage.encoder))
        return sum(digest in held for digest in judged)

    def _stored(self, info: FitInfo) -> Artifact:
        path = artifact_path(self.folder.path, info)
        try:
            artifact = read_artifact(path)
        except SourceError as error:
            raise RunError(f"{error}; start over with --no-resume") from error
        if artifact.sha256 != info.sha256:
            raise RunError(
                f"{path} is not what the rows were made with: sha256 {artifact.sha256}, expected {info.sha256}; "
                "start over with --no-resume"
            )
        return artifact
